"""What mkdocs builds beside the pages in docs/: the reference, the pages of the benchmarks and the lab, the guides, and
the tables' pictures."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402

GUIDES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    """Pages and pictures that stand elsewhere in the repository, under the paths that they have there."""
    for name, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    for path in [
        *GUIDES,
        *tracked("benchmarks", "*.md"),
        *tracked("benchmarks/results", "*.png"),
        *tracked("benchmarks/results", "*.json"),
    ]:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def tracked(folder: str, pattern: str) -> list[str]:
    """Files of a folder of the repository."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern))


def on_config(config: Any) -> Any:
    """The list of pages has every page of the reference."""
    pages = [f"reference/{name}" for name in ("index", *reference.PACKAGES, reference.VIEW)]
    for entry in config.nav:
        if "Reference" in entry:
            entry["Reference"] = [f"{page}.md" for page in pages]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links that are right in the repository become right on the site; one to what is no page, as to source code, is
    its label alone.

    A bar in the code of a table's cell needs no backslash here.
    """
    here, docs = Path(page.file.src_uri).parent, Path(config.docs_dir)
    folder = (docs if (docs / page.file.src_uri).is_file() else ROOT) / here

    def target(match: re.Match[str]) -> str:
        image, label, link = match[1], match[2], match[3]
        path, mark, anchor = link.partition("#")
        there = (folder / path).resolve()
        if "://" in link or not path or not there.exists():
            # of another site, of this page, or of a page that is made: the build says whether it is there
            return match[0]
        inside = there.relative_to(docs if there.is_relative_to(docs) else ROOT).as_posix()
        inside = "index.md" if there == ROOT / "README.md" else inside
        if files.get_file_from_path(inside) is None:
            return label
        return f"{image}[{label}]({os.path.relpath(inside, here)}{mark}{anchor})"

    linked = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", target, markdown)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("\\|", "|"), linked)
