"""Models on the hub: a repository is such a folder, downloaded once and kept in the cache of huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effzoo.folder.description import CONFIG, is_folder

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def folder_of(source: Any) -> Path | None:
    """The folder of a model of effzoo: the source itself, or a copy of the repository of that name on the hub.

    None for what is neither: another path, a repository of transformers, or one that cannot be reached, of which who
    reads it as a checkpoint of transformers then tells.
    """
    if is_folder(source):
        return Path(source)
    if not isinstance(source, str) or Path(source).exists() or not _ID.fullmatch(source):
        return None
    from huggingface_hub import hf_hub_download, snapshot_download  # takes half a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(hf_hub_download(source, CONFIG)).parent
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None
    return Path(snapshot_download(source)) if is_folder(found) else None
