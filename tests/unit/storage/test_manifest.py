"""manifest.json: no bit of it, nor of what it describes, changes unseen; and it leads nowhere outside."""

import hashlib
import json
import os

import pytest

from dist_trainer.errors import CheckpointError
from dist_trainer.storage import manifest
from dist_trainer.storage.manifest import MANIFEST, describe_files, read_json, read_manifest, verify


@pytest.fixture
def folder(tmp_path):
    """Two files, and the manifest of them."""
    inside = tmp_path / "folder"
    (inside / "more").mkdir(parents=True)
    (inside / "weights").write_bytes(b"w" * 100)
    (inside / "more" / "state").write_bytes(b"state")
    (inside / MANIFEST).write_text(describe_files(inside, {"step": 7, "note": "é"}))
    return inside


def sealed_by_a_stranger(folder, files):
    """A manifest whose own digest is right, and which names `files`, as empty ones."""
    nothing = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    (folder / MANIFEST).write_text(manifest._encode_with_digest({"step": 7, "files": dict.fromkeys(files, nothing)}))


def test_what_was_written_is_verified_and_its_facts_read_back(folder):
    found = verify(folder)
    assert found["step"] == 7
    assert found["note"] == "é"
    assert sorted(found["files"]) == ["more/state", "weights"]


def test_no_bit_of_a_manifest_changes_unseen(folder):
    path = folder / MANIFEST
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(place % 4, 8, 4):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            with pytest.raises(CheckpointError, match=r"manifest\.json"):
                read_manifest(folder)
    path.write_bytes(content)
    read_manifest(folder)


@pytest.mark.parametrize("change", [b"\n", b" ", b"{}", b"\0"])
def test_nothing_can_be_appended_to_a_manifest(folder, change):
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes() + change)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(folder)


def test_only_the_named_files_are_compared(folder):
    (folder / "weights").write_bytes(b"")
    verify(folder, only=["more/state"])
    with pytest.raises(CheckpointError, match="weights is damaged: it has 0 bytes"):
        verify(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "more/../../outside", "link", "linked/outside"])
def test_files_outside_are_not_looked_for(folder, name):
    (folder.parent / "outside").write_bytes(b"")
    (folder / "link").symlink_to(folder.parent / "outside")
    (folder / "linked").symlink_to(folder.parent)
    sealed_by_a_stranger(folder, [name])
    with pytest.raises(CheckpointError, match="outside its folder, or through a link"):
        verify(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", ".", "more", "pipe", "missing", "\x1b[31m", "\ud800"])
def test_what_is_no_file_is_rejected_and_not_waited_for(folder, name):
    os.mkfifo(folder / "pipe")
    sealed_by_a_stranger(folder, [name])
    with pytest.raises(CheckpointError) as refused:
        verify(folder)
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "7", '"text"', "{", "[" * 100_000, '{"a": 1', "\xff"])
def test_what_is_no_json_object_is_rejected_by_naming_the_file(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        read_json(path)


def test_a_missing_manifest_is_named(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify(folder)


@pytest.mark.parametrize("entry", [None, 3, [], {"bytes": 100}, {"bytes": "100", "sha256": 5}])
def test_entries_of_wrong_types_are_rejected(folder, entry):
    (folder / MANIFEST).write_text(manifest._encode_with_digest({"files": {"weights": entry}}))
    with pytest.raises(CheckpointError, match="weights"):
        verify(folder)


def test_a_manifest_of_an_older_version_says_so(folder):
    (folder / MANIFEST).write_text(json.dumps({"files": {"weights": {"bytes": 100}}}))
    with pytest.raises(CheckpointError, match="no digest of itself"):
        verify(folder)
