"""Files of text: decompressed by their suffix, decoded strictly, and long ones never whole in memory."""

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
"""Of a file with more than that, so much is read at a time."""


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow  # Python has a decoder of its own from 3.14 on

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), PART_BYTES)  # type: ignore[arg-type]


DECOMPRESSORS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".zst": _open_zstd,
}
COMPRESSIONS = tuple(DECOMPRESSORS)
READING_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a file may raise."""


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
    except READING_ERRORS as error:
        raise unreadable(path, error) from error


def open_binary(path: Path) -> IO[bytes]:
    """The file's content, decompressed by its suffix."""
    return DECOMPRESSORS.get(path.suffix.lower(), partial(Path.open, mode="rb"))(path)


def unreadable(path: Path, error: Exception) -> DataError:
    """The message for a file that the system or its own format makes unreadable."""
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: cannot be read ({reason})")
