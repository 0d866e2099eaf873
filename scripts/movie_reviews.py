"""Write data/movie_reviews.jsonl.gz, the demo's documents: python scripts/movie_reviews.py movie_reviews.zip

The zip is `packages/corpora/movie_reviews.zip` of the repository nltk/nltk_data. Its source and licence stand in
data/README.md. Texts are kept to the byte; the same zip gives the same file.
"""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path

LABELS = ("neg", "pos")
WRITTEN = Path(__file__).parent.parent / "data/movie_reviews.jsonl.gz"


def lines(source: Path) -> list[str]:
    """One JSON object for each review, {"text": ..., "label": "neg" or "pos"}: the negative ones first, by name."""
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".txt"))
        found = [{"text": archive.read(name).decode("ascii"), "label": name.split("/")[-2]} for name in names]
    counts = [sum(row["label"] == label for row in found) for label in LABELS]
    if counts != [1000, 1000]:
        raise SystemExit(f"{source} has {counts} reviews in neg/ and pos/; movie_reviews.zip has 1,000 in each")
    return [json.dumps(row) + "\n" for row in found]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    WRITTEN.write_bytes(gzip.compress("".join(lines(Path(sys.argv[1]))).encode(), compresslevel=9, mtime=0))
    print(f"{WRITTEN}: {WRITTEN.stat().st_size:,} bytes")
