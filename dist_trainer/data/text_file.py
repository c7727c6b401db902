"""Text files: decompressed according to their suffix, decoded strictly, and read in parts if long."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from dist_trainer.errors import DataError

PART_BYTES = 1 << 24
"""Longer files are read in parts of this size."""


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow  # Python's own decoder needs 3.14

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), PART_BYTES)  # type: ignore[arg-type]


DECOMPRESSORS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".zst": _open_zstd,
}
COMPRESSIONS = tuple(DECOMPRESSORS)
READING_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""The errors that reading a file can raise."""


class LongText:
    """The text of a file that is too large for memory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def parts(self) -> Iterator[str]:
        """The text in parts. Raises DataError."""
        return text_parts(self._path)

    def __str__(self) -> str:
        """All of it, for a template."""
        return "".join(self.parts())


def text_parts(path: Path) -> Generator[str, None, None]:
    """The text in parts of PART_BYTES. Raises DataError naming a line that is not UTF-8."""
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
    except READING_ERRORS as error:
        raise unreadable(path, error) from error


def open_binary(path: Path) -> IO[bytes]:
    """The file's content, decompressed according to its suffix."""
    return DECOMPRESSORS.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path)


def unreadable(path: Path, error: Exception) -> DataError:
    """The error for a file that cannot be read, because of either the system or its content."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason})")
