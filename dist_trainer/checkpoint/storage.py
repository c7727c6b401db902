"""A folder that exists whole or not at all, and that says of itself whether it is intact.

Written beside its place under a hidden name, every file synced, the manifest (sizes and digests of all files) last, then
the folder synced, renamed, and its parent synced. Deleted by renaming to a hidden name first. What a killed process
leaves behind therefore always has a hidden name, and `sweep` removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.errors import CheckpointError

MANIFEST = "manifest.json"
STAGING_PREFIX = ".staging-"
TRASH_PREFIX = ".trash-"
ASIDE_PREFIX = ".aside-"
DIGEST = "sha256"
_READ_BYTES = 1 << 22


def publish(folder: Path, write: Callable[[Path], None], *, facts: dict[str, Any]) -> None:
    """Make `folder` appear with what `write` puts into it, and `facts` in its manifest.

    Raises OSError where the disk refuses; then nothing is visible and the staging folder is gone as far as possible.
    """
    staging = folder.parent / f"{STAGING_PREFIX}{folder.name}"
    _remove(staging)
    staging.mkdir(parents=True)
    try:
        write(staging)
        readable = staging.stat().st_mode & 0o666  # as the user's umask has it; safetensors makes private files
        files = {}
        for path in sorted(path for path in staging.rglob("*") if path.is_file()):
            files[path.relative_to(staging).as_posix()] = {"bytes": path.stat().st_size, DIGEST: _digest(path)}
            path.chmod(readable)
            _sync(path)
        manifest = staging / MANIFEST
        manifest.write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
        _sync(manifest)
        for directory in sorted({path.parent for path in staging.rglob("*")}, reverse=True):
            _sync(directory)
        aside = folder.with_name(f"{ASIDE_PREFIX}{folder.name}")
        if folder.exists():
            os.rename(folder, aside)
        os.rename(staging, folder)
        _sync(folder.parent)
        _remove(aside)
    except BaseException:
        _remove(staging)
        raise


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`, after every file was compared with its size and digest.

    Raises CheckpointError naming the first file that is missing or differs.
    """
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST} lists no files")
    for name, entry in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST} names a file outside its folder: {name}")
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} is missing ({error.strerror})") from error
        if size != entry.get("bytes"):
            raise CheckpointError(f"{path} has {size} bytes where the manifest says {entry.get('bytes')}")
        if _digest(path) != entry.get(DIGEST):
            raise CheckpointError(f"{path} is damaged: its {DIGEST} is not the manifest's")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; raises CheckpointError naming the path."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with `text`: readers see the old or the new one, also after a power cut."""
    staging = path.with_name(f"{STAGING_PREFIX}{path.name}")
    staging.write_text(text, encoding="utf-8")
    _sync(staging)
    os.replace(staging, path)
    _sync(path.parent)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, a sibling; readers see the old or the new one."""
    staging = link.with_name(f"{STAGING_PREFIX}{link.name}")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target.name)
    os.replace(staging, link)
    _sync(link.parent)


def discard(folder: Path) -> None:
    """Delete `folder`; from the first moment on nobody sees a part of it under its name."""
    trash = folder.with_name(f"{TRASH_PREFIX}{folder.name}")
    _remove(trash)
    os.rename(folder, trash)
    _remove(trash)


def sweep(parent: Path) -> None:
    """Remove what interrupted writes and deletions left in `parent`, and bring back what was about to be replaced."""
    for path in list(parent.iterdir()) if parent.is_dir() else []:
        original = path.with_name(path.name.removeprefix(ASIDE_PREFIX))
        if path.name.startswith(ASIDE_PREFIX) and not original.exists():
            path.rename(original)
        elif path.name.startswith((STAGING_PREFIX, TRASH_PREFIX, ASIDE_PREFIX)):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    digest = hashlib.new(DIGEST)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
