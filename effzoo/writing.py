"""Files that are written whole or not at all, whatever is killed when: every file that effzoo writes for later goes
through here.

The content goes to a new file beside the old one, with a name nobody can guess, is forced to disk, and is renamed into
place: a reader sees the old file or the new one. A rename replaces a symbolic link, and never what it points to. Who
writes holds a lock on the folder, which the operating system takes back when the process ends: writers come one after
the other, and what a killed one left half written is removed by the next.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from effzoo.errors import FileError

Content = bytes | Callable[[Path], None]
PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")
_STAGED = ".staged-"


def replace_file(path: str | Path, content: Content) -> None:
    """Write one file whole or not at all.

    path: the file; its folder is made if there is none.
    content: bytes, or a function that writes them into the path that it is given.

    Raises FileError; what was there is then as it was.
    """
    path = Path(path)
    replace_files(path.parent, {path.name: content})


def replace_files(
    folder: Path,
    contents: Mapping[str, Content],
    *,
    absent: Iterable[str] = (),
    afterwards: Callable[[], None] | None = None,
) -> None:
    """Write several files of one folder in the given order, each whole or not at all; make the folder if there is none.

    contents: name -> content, as in `replace_file`. All are on disk under temporary names before the first gets its
        own, so what does not fit changes nothing.
    absent: files that are removed before the first new one is there, where a mixture of old and new would be read.
    afterwards: called last, while no other writer is in the folder. Where the file system has no locks it is not
        called, and nothing that others left is removed.

    Raises FileError in one sentence (no space, no permission, a folder in the place of a file).
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder) as locked:
            temporary = {name: folder / f".{name}.{secrets.token_hex(8)}.partial" for name in contents}
            try:
                for name, content in contents.items():
                    if (folder / name).is_dir():
                        raise FileError(
                            f"{folder / name} is a folder, where a file is to be written; remove it, or "
                            "choose another folder"
                        )
                    _write_new(temporary[name], content)
                for name in absent:
                    (folder / name).unlink(missing_ok=True)
                for name, written in temporary.items():
                    os.replace(written, folder / name)
                force_to_disk(folder)
            except BaseException:
                for written in temporary.values():
                    with suppress(OSError):  # the first error is the one to tell of
                        written.unlink(missing_ok=True)
                raise
            if locked:
                for left in folder.iterdir():
                    if PARTIAL.fullmatch(left.name):
                        left.unlink(missing_ok=True)
                if afterwards is not None:
                    afterwards()


@contextmanager
def replace_folder(folder: Path, last: str, older: Callable[[], Iterable[Path]]) -> Iterator[Path]:
    """A new folder to write in, whose files and folders come into `folder` when the block ends without an error.

    last: the file that says that the rest is whole: the old one is removed first, and the new one comes last.
    older: what the files before were, all of which go when the old `last` has gone.

    Folders inside are joined: what is in them replaces what has its name. Other writers wait. Raises FileError.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder) as locked:
            for left in folder.glob(f"{_STAGED}*") if locked else ():
                shutil.rmtree(left, ignore_errors=True)
            staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=folder))
            try:
                yield staged
                written = [path.relative_to(staged) for path in sorted(staged.rglob("*"))]
                for path in (*written, Path()):
                    force_to_disk(staged / path)
                gone = list(older())
                (folder / last).unlink(missing_ok=True)
                for path in gone:
                    _remove(path)
                for path in sorted(
                    (path for path in written if (staged / path).is_file()), key=lambda path: path == Path(last)
                ):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staged / path, folder / path)
                for path in {(folder / path).parent for path in written}:
                    force_to_disk(path)
            finally:
                shutil.rmtree(staged, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the operating system inside the `with` block as a FileError that says what could not be written."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        failed = FileError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that can be written to and has room"
        )
        failed.errno = error.errno
        raise failed from error


def force_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, content: Content) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
            file.flush()
        else:
            content(path)
        os.fsync(file.fileno())


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Keep other writers out of a folder; False where the file system has no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
