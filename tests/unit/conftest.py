from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations from here on that decide what a power cut leaves: `fsync NAME`, `rename NEW_NAME`, `delete NAME`, ..."""
    operations: list[str] = []

    def record(module: Any, function: str, word: str, argument: int) -> None:
        real = getattr(module, function)

        def recorded(*arguments: Any, **named: Any) -> Any:
            target = arguments[argument]
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
            if word != "delete" or path.exists():
                operations.append(f"{word} {path.name}")
            return real(*arguments, **named)

        monkeypatch.setattr(module, function, recorded)

    record(os, "fsync", "fsync", 0)
    record(os, "ftruncate", "truncate", 0)
    record(os, "mkdir", "make", 0)
    for function in ("rename", "replace"):
        record(os, function, "rename", 1)
    record(shutil, "rmtree", "delete", 0)
    return operations
