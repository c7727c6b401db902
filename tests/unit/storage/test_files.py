"""A file is replaced completely or not at all, also if the disk refuses, and no link is followed."""

import errno
import os

import pytest

from dist_trainer.storage import files
from dist_trainer.storage.files import replace_file, replace_or_overwrite, truncate_file


def no_room_for(name, monkeypatch, code=errno.ENOSPC):
    """Files called `name` cannot be written to."""
    real = files.Path.open

    def refuse(path, mode="r", *arguments, **named):
        if path.name == name and "r" not in mode:
            path.touch()
            raise OSError(code, os.strerror(code))
        return real(path, mode, *arguments, **named)

    monkeypatch.setattr(files.Path, "open", refuse)


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path, durable):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    replace_file(path, [b"new", b"er"], durable=durable)
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["file"]


def test_a_durable_file_is_synced_before_it_is_renamed_and_its_folder_after_that(tmp_path, trail):
    replace_file(tmp_path / "file", [b"new"], durable=True)
    assert trail == ["fsync .staging-file", "rename file", f"fsync {tmp_path.name}"]
    trail.clear()
    replace_file(tmp_path / "file", [b"newer"], durable=False)
    assert trail == ["rename file"]


def test_a_file_that_is_truncated_or_overwritten_is_synced(tmp_path, monkeypatch, trail):
    (tmp_path / "file").write_bytes(b"a line\nhalf a l")
    truncate_file(tmp_path / "file", 7)
    assert trail == ["truncate file", "fsync file"]
    trail.clear()
    no_room_for(".staging-file", monkeypatch)
    replace_or_overwrite(tmp_path / "file", b"new", durable=True)
    assert trail == ["fsync file"]


def test_if_the_disk_refuses_the_old_file_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    no_room_for(".staging-file", monkeypatch)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, [b"new"], durable=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_in_the_middle_leaves_the_old_file_and_no_half(tmp_path):
    def chunks():
        yield b"new"
        raise RuntimeError("of whoever makes the content")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="whoever"):
        replace_file(path, chunks(), durable=False)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["file", ".staging-file"])
def test_links_are_replaced_and_not_followed(tmp_path, name):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    victim.write_bytes(b"precious")
    (folder / name).symlink_to(victim)
    replace_file(folder / "file", [b"new"], durable=True)
    assert victim.read_bytes() == b"precious"
    assert (folder / "file").read_bytes() == b"new"
    assert not (folder / "file").is_symlink()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("new", [b'{"a": 1}\n', b'{"a": "longer than what stood there before"}\n'])
def test_without_room_for_a_second_file_the_first_is_written_over(tmp_path, monkeypatch, code, new):
    path = tmp_path / "file"
    path.write_bytes(b'{"state": "running"}\n')
    no_room_for(".staging-file", monkeypatch, code)
    replace_or_overwrite(path, new, durable=True)
    assert path.read_bytes().rstrip() == new.rstrip()
    assert len(path.read_bytes()) >= len(b'{"state": "running"}\n')
    assert os.listdir(tmp_path) == ["file"]


def test_it_is_not_written_over_for_other_reasons_nor_by_more_than_a_block(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    no_room_for(".staging-file", monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        replace_or_overwrite(path, b"new", durable=False)
    monkeypatch.undo()
    no_room_for(".staging-file", monkeypatch)
    with pytest.raises(OSError, match="No space"):
        replace_or_overwrite(path, b"x" * 5000, durable=False)
    assert path.read_bytes() == b"old"


def test_a_link_is_not_written_over_either(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "file").symlink_to(victim)
    no_room_for(".staging-file", monkeypatch)
    with pytest.raises(OSError, match="symbolic links"):
        replace_or_overwrite(tmp_path / "file", b"new", durable=False)
    assert victim.read_bytes() == b"precious"
