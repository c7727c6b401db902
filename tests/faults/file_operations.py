"""What a thread does to files, one operation at a time: to die before any of them."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

CHANGING = {
    *("open", "write", "writelines", "flush", "close", "truncate", "fsync", "chmod", "mkdir", "rmdir", "unlink", "remove"),
    *("rename", "replace", "symlink", "serialize_file", "save", "ftruncate", "pwrite"),
}
OF_MODULES = ("posix", "_io", "io", "tokenizers", "safetensors")


class Operations:
    """A profile function that counts, in its thread, calls that change files, and tells of each before it happens."""

    def __init__(self, before: Callable[[int, str], Any]) -> None:
        self.before = before
        self.count = 0
        self._telling = False

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if self._telling or event != "c_call" or function.__name__ not in CHANGING:
            return
        owner = getattr(function, "__self__", None)
        module = getattr(function, "__module__", None) or type(owner).__module__
        if module.split(".")[0] in OF_MODULES or type(owner).__module__.split(".")[0] in OF_MODULES:
            number, self.count = self.count, self.count + 1
            self._telling = True  # what `before` does is none of them
            try:
                self.before(number, function.__name__)
            finally:
                self._telling = False
