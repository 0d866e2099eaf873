"""Files and checkpoints are written whole or not at all, and what goes wrong is a sentence."""

import errno
import os
import stat

import pytest
import safetensors
import safetensors.torch

import effzoo
from effzoo.errors import FileError, TrainingError
from effzoo.train import checkpoints
from effzoo.writing import replace_file, replace_files


def test_a_checkpoint_that_fails_leaves_the_earlier_ones_and_nothing_else(tmp_path):
    with checkpoints.writing(tmp_path, 3) as folder:
        (folder / "state").write_text("three")
    for raised, expected in (
        (OSError(errno.ENOSPC, "No space left on device"), FileError),
        (TrainingError("the loss is nan"), TrainingError),
        (ValueError("not about files"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(expected) as caught, checkpoints.writing(tmp_path, 6) as folder:
            (folder / "state").write_text("six")
            raise raised
        assert expected is not FileError or f"cannot write {tmp_path / 'checkpoint-6'}: No space left on device" in str(
            caught.value
        )
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"] and (
            tmp_path / "checkpoint-3" / "state"
        ).read_text() == "three"


def test_a_checkpoint_is_not_written_through_a_link_with_its_name(tmp_path):
    run, precious = tmp_path / "run", tmp_path / "precious"
    precious.mkdir()
    (precious / "state").write_text("mine")
    run.mkdir()
    for name in (".partial-3", ".removed-checkpoint-3"):
        (run / name).symlink_to(precious)
    for _ in range(2):  # the second one takes the place of the first
        with checkpoints.writing(run, 3) as folder:
            (folder / "state").write_text("three")
    assert (run / "checkpoint-3" / "state").read_text() == "three" and (precious / "state").read_text() == "mine"


def test_weights_that_do_not_fit_on_the_disk_leave_the_old_ones(tiny, tmp_path, monkeypatch):
    model = effzoo.build("bert", **tiny)
    checkpoints.save_weights(model, tmp_path)
    before = (tmp_path / checkpoints.WEIGHTS).read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(FileError, match=r"cannot write .*: I/O error: No space left on device"):
        checkpoints.save_weights(model, tmp_path)
    assert (tmp_path / checkpoints.WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_has_the_permissions_that_others_get_and_replaces_a_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "figure.png").symlink_to(tmp_path / "precious")
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "figure.png", b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "figure.png").stat().st_mode) == 0o640
    assert (tmp_path / "figure.png").read_bytes() == b"new" and (tmp_path / "precious").read_text() == "mine"


def test_names_that_are_not_there_yet_cannot_be_guessed(tmp_path, monkeypatch):
    seen, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (seen.append(source.name), real(source, target)))
    for _ in range(3):
        replace_files(tmp_path, {"a": b"1"})
    assert len(set(seen)) == 3 and all(len(name) == len(".a..partial") + 16 for name in seen)


def test_what_a_killed_writer_left_goes_with_the_next_and_nothing_else_does(tmp_path):
    kept = ["notes.partial", ".notes.partial", ".a.0123.partial", ".a.0123456789abcdef.partial.txt"]
    for name in (*kept, ".a.0123456789abcdef.partial", ".b.fedcba9876543210.partial"):
        (tmp_path / name).write_text("x")
    replace_files(tmp_path, {"a": b"1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a"])


def test_where_the_file_system_has_no_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    import fcntl

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / ".a.0123456789abcdef.partial").write_text("perhaps somebody is writing it")
    replace_files(tmp_path, {"a": b"1"}, afterwards=lambda: pytest.fail("something was removed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.0123456789abcdef.partial", "a"]
