"""A folder is complete or absent, whatever operation the process dies at."""

import contextlib
import errno
import os
from pathlib import Path

import pytest

from dist_trainer.errors import CheckpointError
from dist_trainer.storage import files, folders
from dist_trainer.storage.files import REFUSED
from dist_trainer.storage.folders import delete_folder, make_folder, publish, remove_stale, update_symlink
from dist_trainer.storage.manifest import verify


def write_two_files(folder: Path) -> None:
    (folder / "weights").write_bytes(b"w" * 1000)
    (folder / "more").mkdir()
    (folder / "more" / "state").write_bytes(b"s" * 10)


def published(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000001"
    publish(folder, write_two_files, metadata={"step": 1})
    return folder


def test_a_published_folder_is_valid_and_has_its_metadata(tmp_path):
    folder = published(tmp_path)
    manifest = verify(folder)
    assert manifest["step"] == 1
    assert manifest["files"]["weights"]["bytes"] == 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]


@pytest.mark.parametrize("name", ["weights", "more/state"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "flip"])
def test_damage_to_any_file_is_noticed_and_the_file_named(tmp_path, name, damage):
    folder = published(tmp_path)
    path = folder / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"truncate": content[:-1], "empty": b"", "flip": flipped}[damage])
    with pytest.raises(CheckpointError, match=path.name):
        verify(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": {"../../etc/passwd": {"bytes": 1}}}'])
def test_a_damaged_or_hostile_manifest_is_rejected(tmp_path, text):
    folder = published(tmp_path)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(folder)


def test_everything_is_synced_before_the_folder_becomes_visible(tmp_path, monkeypatch):
    trail = []
    real_sync, real_rename = folders.sync, os.rename

    def sync(path):
        trail.append(("sync", Path(path).name))
        real_sync(path)

    def rename(source, target):
        trail.append(("rename", Path(target).name))
        real_rename(source, target)

    monkeypatch.setattr(folders, "sync", sync)
    monkeypatch.setattr(os, "rename", rename)
    published(tmp_path)
    rename_at = trail.index(("rename", "step-00000001"))
    assert set(trail[:2]) == {("sync", "weights"), ("sync", "state")}
    assert trail[2:rename_at] == [("sync", name) for name in ("manifest.json", "more", ".staging-step-00000001")]
    assert ("sync", tmp_path.name) in trail[rename_at:]


class DiedError(BaseException):
    pass


@pytest.mark.parametrize("replacing", [False, True])
def test_dying_at_any_single_operation_leaves_a_valid_folder_or_none(tmp_path, monkeypatch, replacing):
    """Counts the operations of a complete save, then dies before each of them in turn."""
    operations = ["sync", "os.rename", "write", "remove"]

    def save_in(parent: Path, *, die_at: int) -> int:
        count = 0

        def may_die(function):
            def wrapped(*arguments, **named):
                nonlocal count
                if count == die_at:
                    raise DiedError
                count += 1
                return function(*arguments, **named)

            return wrapped

        with monkeypatch.context() as patched:
            patched.setattr(folders, "sync", may_die(folders.sync))
            patched.setattr(os, "rename", may_die(os.rename))
            real_remove = folders.remove
            # A dying process does not clean up.
            patched.setattr(folders, "remove", lambda path: None if count == die_at else may_die(real_remove)(path))
            with contextlib.suppress(DiedError):
                publish(parent / "step-00000001", may_die(write_two_files), metadata={"step": 2})
        return count

    total = save_in(tmp_path / "rehearsal", die_at=10_000)
    assert total > len(operations)
    for die_at in range(total):
        parent = tmp_path / f"die-{die_at}"
        parent.mkdir()
        if replacing:
            published(parent)
        save_in(parent, die_at=die_at)
        remove_stale(parent)
        found = sorted(path.name for path in parent.iterdir())
        assert found in ([], ["step-00000001"])
        if replacing:
            assert found, f"the old folder was lost at operation {die_at}"
        if found:
            verify(parent / "step-00000001")


def test_a_full_disk_leaves_no_files(tmp_path):
    def fill(folder: Path) -> None:
        write_two_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path / "step-00000001", fill, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_pointers_are_replaced_and_relative(tmp_path):
    folder = published(tmp_path)
    update_symlink(tmp_path / "latest", folder)
    update_symlink(tmp_path / "latest", folder)
    assert os.readlink(tmp_path / "latest") == "step-00000001"


def test_a_deleted_folder_leaves_nothing(tmp_path):
    delete_folder(published(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_links_deletions_and_new_folders_are_synced(tmp_path, trail):
    folder = published(tmp_path)
    trail.clear()
    update_symlink(tmp_path / "latest", folder)
    assert trail == ["rename latest", f"fsync {tmp_path.name}"]
    trail.clear()
    delete_folder(folder)
    assert trail == [f"rename .trash-{folder.name}", f"fsync {tmp_path.name}", f"delete .trash-{folder.name}"]
    trail.clear()
    make_folder(tmp_path / "runs" / "run")
    assert trail == ["make runs", f"fsync {tmp_path.name}", "make run", "fsync runs"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, *sorted(REFUSED)])
def test_a_refused_fsync_loses_no_checkpoint_and_one_that_fails_publishes_none(tmp_path, monkeypatch, number):
    def fsync(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_warned", set())
    with contextlib.nullcontext() if number in REFUSED else pytest.raises(OSError, match=os.strerror(number)):
        published(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["step-00000001"] if number in REFUSED else [])
