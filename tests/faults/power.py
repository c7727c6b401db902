"""A model of what a disk holds after a power cut: what was synced, and of the rest what is worst.

Contents that were not synced are lost. Of names (creations, renames, deletions) that were not synced, a file system may
have kept all or none: both are tried. Renames and deletions are seen through Python's audit events and fsync is wrapped,
so this belongs in a process of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")
Names = Literal["kept", "lost"]


class Disk:
    """The durable state of everything below `root`, which at first is as it stands there."""

    def __init__(self, root: Path, before: Callable[[str], Any] = lambda _: None) -> None:
        """`before` is called before each operation that changes names, and before each fsync."""
        self.root = root
        self._before = before
        self._watching = True
        self._contents: dict[int, bytes] = {}
        self._links: dict[int, str] = {}
        self._names: dict[int, dict[str, int]] = {}
        # Numbers of deleted files are given out again: as long as these stand, no two things have one number.
        self._pins: list[int] = []
        for path in [root, *sorted(root.rglob("*"))]:
            self._sync(path)
        fsync = os.fsync

        def noted_fsync(file: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{file}"))
            self._tell(f"fsync {path.name}")
            fsync(file)
            if path.is_relative_to(root):
                self._sync(path)

        os.fsync = noted_fsync
        sys.addaudithook(self._hear)

    def stop(self) -> None:
        """Watch no more."""
        self._watching = False

    def after_power_cut(self, into: Path, *, names: Names) -> Path:
        """What would be found if the power failed now, written to the new folder `into`."""
        watching, self._watching = self._watching, False
        self._write(self.root, self._number_of(self.root), into, names)
        self._watching = watching
        return into

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self._tell(f"{event} {Path(os.fsdecode(arguments[0])).name}")

    def _tell(self, operation: str) -> None:
        if self._watching:
            self._watching = False
            self._before(operation)
            self._watching = True

    def _sync(self, path: Path) -> None:
        number = self._number_of(path)
        if path.is_symlink():
            self._links[number] = os.readlink(path)
        elif path.is_dir():
            self._names[number] = {child.name: self._number_of(child) for child in path.iterdir()}
            # With its name, a link's text is there, too: it stands in the inode.
            self._links.update({self._number_of(c): os.readlink(c) for c in path.iterdir() if c.is_symlink()})
        elif path.is_file():
            self._contents[number] = path.read_bytes()

    def _number_of(self, path: Path) -> int:
        number = path.lstat().st_ino
        self._pins.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        return number

    def _write(self, path: Path, number: int, into: Path, names: Names) -> None:
        into.mkdir()
        children = self._names.get(number, {})
        if names == "kept" and path.is_dir():
            children = {child.name: child.lstat().st_ino for child in path.iterdir()}
        for name, child in children.items():
            standing = path / name if names == "kept" else self._where(child)
            if child in self._links or (names == "kept" and standing.is_symlink()):
                (into / name).symlink_to(self._links.get(child) or os.readlink(standing))
            elif child in self._names or (names == "kept" and standing.is_dir()):
                self._write(standing, child, into / name, names)
            else:
                (into / name).write_bytes(self._contents.get(child, b""))

    def _where(self, number: int) -> Path:
        """Only its number counts where names are lost."""
        return self.root / f"number-{number}"
