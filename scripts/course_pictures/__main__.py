"""Draw the pictures of some assignments, or of all."""

from __future__ import annotations

import importlib
import io
import sys

from effzoo.course import assignments, find
from effzoo.writing import replace_file

for name in sys.argv[1:] or assignments():
    figure = importlib.import_module(f"scripts.course_pictures.{find(name).name}").draw()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    replace_file(find(name).folder / "picture.png", drawn.getvalue())
