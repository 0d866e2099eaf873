"""The command line, `effzoo`: one file per group of commands; the application that they join is in `terminal`."""

from effzoo.cli.terminal import app

__all__ = ["app"]
