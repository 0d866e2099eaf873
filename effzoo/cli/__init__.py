"""The command line, `effzoo`: one file per group of commands; the application they join is in `terminal`."""

from effzoo.cli import bench, check, lab, matrix, plan, show, train
from effzoo.cli.terminal import app

__all__ = ["app", "bench", "check", "lab", "matrix", "plan", "show", "train"]
