"""What disks, people and strangers do to files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


def flip_bit(path: Path, *, seed: int = 0) -> None:
    """One bit, anywhere in the file."""
    rng = random.Random(f"{path.name} {seed}")
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """The last byte is gone."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """No byte is left."""
    path.write_bytes(b"")


def delete(path: Path) -> None:
    """Nor a name."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {"flip_bit": flip_bit, "truncate": truncate, "empty": empty, "delete": delete}


@contextmanager
def damaged(path: Path, damage: Callable[[Path], None]) -> Generator[None]:
    """`path` after `damage`; healed at the end."""
    content = path.read_bytes()
    damage(path)
    try:
        yield
    finally:
        path.write_bytes(content)


def fill(disk: Path) -> None:
    """Take all the room that `disk` has, to the last byte."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError:
                pass


def make_room(disk: Path, *, just: int | None = None) -> None:
    """Give it back, or `just` so many bytes of it."""
    ballast = disk / "ballast"
    if just is None:
        ballast.unlink()
    else:
        os.truncate(ballast, ballast.stat().st_size - just)


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that stands in `folder`: files by content, links by what they say."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
