"""manifest.json: size and digest of every file in a folder, and a digest of the manifest itself.

The manifest has exactly one valid encoding, so no bit of it can change unnoticed. Digests detect damage, not forgery: folders
are untrusted, and no file outside them is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dist_trainer.errors import CheckpointError, counted

MANIFEST = "manifest.json"
DIGEST = "sha256"
OWN_DIGEST = "manifest_sha256"
_READ_BYTES = 1 << 22
_MAX_JSON_BYTES = 1 << 26


def describe_files(folder: Path, metadata: dict[str, Any]) -> str:
    """The text of the manifest of `folder` as it is now, with `metadata` in it."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, DIGEST: digest_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return _encode_with_digest({**metadata, "files": files})


def verify(folder: Path, *, only: Collection[str] | None = None) -> dict[str, Any]:
    """The manifest of `folder`, after every file (or those named in `only`) was compared with its size and digest.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        if only is None or name in only:
            _compare(folder, name, entry if isinstance(entry, dict) else {})
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises CheckpointError if it is missing or was changed."""
    path = folder / MANIFEST
    manifest = read_json(path)
    body = {key: value for key, value in manifest.items() if key != OWN_DIGEST}
    if OWN_DIGEST not in manifest:
        raise CheckpointError(f"{path} is damaged, or older than version 0.1: it has no digest of itself")
    if _bytes_of(path) != _encode_with_digest(body).encode():
        raise CheckpointError(f"{path} is damaged: its {DIGEST} does not match the one in it")
    if not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise CheckpointError(f"{path} lists no files")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; raises CheckpointError naming the path."""
    try:
        value = json.loads(_bytes_of(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object")
    return value


def digest_of_file(path: Path) -> str:
    """SHA-256 of the content. Raises OSError."""
    digest = hashlib.new(DIGEST)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _encode_with_digest(body: dict[str, Any]) -> str:
    own = hashlib.new(DIGEST, _encode(body).encode()).hexdigest()
    return _encode({**body, OWN_DIGEST: own})


def _encode(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _bytes_of(path: Path) -> bytes:
    _check_file_inside(path.parent, path.name)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} is damaged: it has more than {_MAX_JSON_BYTES:,} bytes")
    return content


def _compare(folder: Path, name: str, entry: dict[str, Any]) -> None:
    _check_file_inside(folder, name)
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.get("bytes"):
            raise CheckpointError(
                f"{path} is damaged: it has {counted(size, 'byte')} but the manifest says {entry.get('bytes')!r}"
            )
        if digest_of_file(path) != entry.get(DIGEST):
            raise CheckpointError(f"{path} is damaged: its {DIGEST} does not match the manifest")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def _check_file_inside(folder: Path, name: str) -> None:
    """Reject links and names that lead out of `folder`, and pipes or devices, which could block a reader forever."""
    try:
        real = Path(os.path.realpath(folder / name))
        inside = real.is_relative_to(os.path.realpath(folder))
        is_file = stat.S_ISREG(real.stat().st_mode) if inside else False
    except OSError as error:
        raise CheckpointError(f"{_shown(folder / name)} is missing ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} names {name!r}, which cannot be a file") from error
    if not inside:
        raise CheckpointError(f"{folder / MANIFEST} names a file outside its folder, or through a link out of it: {name!r}")
    if not is_file:
        raise CheckpointError(f"{_shown(folder / name)} is not a file")


def _shown(path: Path) -> str:
    """For messages, where a hostile name must not move the cursor."""
    return str(path) if str(path).isprintable() else repr(str(path))
