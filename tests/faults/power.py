"""What would be left of a run if the power failed: a watch over what is synced, and what counts on it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class PowerWatch:
    """Knows what each file and folder held at its last fsync, and complains where something is done that counts on more.

    A checkpoint that becomes visible must be synced whole, and the metrics up to its step; a pointer must point at what a
    synced folder names; of what is deleted, no name may be left on the disk.
    """

    def __init__(self, monkeypatch: Any, *, dies_of_a_complaint: bool = False) -> None:
        self.complaints: list[str] = []
        self.published: list[str] = []
        self.pointed: list[str] = []
        self.discarded: list[str] = []
        self._dies = dies_of_a_complaint
        self._synced: dict[str, str] = {}
        """State at the last fsync, by path."""
        self._fsync, self._rename, self._replace, self._unlink = os.fsync, os.rename, os.replace, os.unlink
        for name in ("fsync", "rename", "replace", "unlink"):
            monkeypatch.setattr(os, name, getattr(self, f"_on_{name}"))

    def unsynced_folders(self) -> list[str]:
        """Folders in which names have changed since they were synced."""
        return [path for path, state in self._synced.items() if os.path.isdir(path) and _state(Path(path)) != state]

    def _on_fsync(self, file: int) -> None:
        self._fsync(file)
        path = os.readlink(f"/proc/self/fd/{file}")
        self._synced[path] = _state(Path(path))

    def _on_rename(self, source: Any, target: Any, **where: Any) -> None:
        source, target = Path(source), Path(target)
        if target.name.startswith("step-"):
            self._see_that_all_is_synced(source)
            self._see_that_metrics_are_synced(target)
            self.published.append(target.name)
        self._rename(source, target, **where)
        for path in [path for path in self._synced if Path(path).is_relative_to(source)]:
            self._synced[str(target / Path(path).relative_to(source))] = self._synced.pop(path)
        if target.name.startswith(".trash-"):
            self.discarded.append(source.name)

    def _on_replace(self, source: Any, target: Any) -> None:
        if os.path.islink(source):
            self._see_that_names_are_synced(Path(target).parent)
            self.pointed.append(Path(target).name)
        elif Path(target).name in ("config.yaml", "metrics.jsonl"):  # the others are never read again
            self._see_that_all_is_synced(Path(source))
        self._replace(source, target)

    def _on_unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        folder = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) if dir_fd is not None else Path(path).parent
        for trash in (parent for parent in (folder, *folder.parents) if parent.name.startswith(".trash-")):
            self._see_that_names_are_synced(trash.parent)
        self._unlink(path, dir_fd=dir_fd)

    def _see_that_all_is_synced(self, path: Path) -> None:
        for part in [path, *path.rglob("*")]:
            if self._synced.get(str(part)) != _state(part):
                self._complain(f"{part} is not synced")

    def _see_that_names_are_synced(self, folder: Path) -> None:
        if self._synced.get(str(folder)) != _state(folder):
            self._complain(f"the names in {folder} are not synced")

    def _see_that_metrics_are_synced(self, checkpoint: Path) -> None:
        metrics = checkpoint.parent.parent / "metrics.jsonl"
        if not metrics.exists():
            return
        size = int(self._synced.get(str(metrics), "0").partition(" ")[0])
        steps = [json.loads(line)["step"] for line in metrics.read_bytes()[:size].splitlines()]
        if max(steps, default=0) < int(checkpoint.name.removeprefix("step-")):
            self._complain(f"{metrics} is synced up to step {max(steps, default=0)} when {checkpoint.name} becomes visible")

    def _complain(self, complaint: str) -> None:
        self.complaints.append(complaint)
        assert not self._dies, complaint


def _state(path: Path) -> str:
    """Size and digest of a file; names in a folder, and where its links point, but for hidden names, which may come back."""
    if path.is_dir():
        names = [name for name in sorted(os.listdir(path)) if not name.startswith(".")]
        return " ".join(f"{name}>{os.readlink(path / name)}" if (path / name).is_symlink() else name for name in names)
    content = path.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}"
