"""Files of text: decompressed by their suffix, decoded strictly, and long ones never whole in memory."""

from __future__ import annotations

import codecs
import gzip
import lzma
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO

from dist_trainer.errors import DataError

PART_BYTES = 1 << 24
"""Of a file with more than that, so much is read at a time."""


class LongText:
    """The text of a file that is too long to be held in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def parts(self) -> Iterator[str]:
        """The text, part by part, from its beginning. Raises DataError."""
        return text_parts(self._path)

    def __str__(self) -> str:
        """All of it at once, for a template."""
        return "".join(self.parts())


def text_parts(path: Path) -> Generator[str, None, None]:
    """The text of some PART_BYTES at a time. Raises DataError naming the line where it is not UTF-8."""
    lines = 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        with open_binary(path) as file:
            while raw := file.read(PART_BYTES):
                part = decoder.decode(raw)
                lines += part.count("\n")
                yield part
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line = lines + error.object[: error.start].count(b"\n")
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte {error.object[error.start]:#04x}); convert it, for example with iconv"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, error) from error


def open_binary(path: Path) -> IO[bytes]:
    """The file's content, decompressed by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)  # type: ignore[return-value]
    return path.open("rb")


def unreadable(path: Path, error: Exception) -> DataError:
    """The message for a file that the system or its own format makes unreadable."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason})")
