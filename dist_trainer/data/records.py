"""Records of local files, each with the place it stands at: text, JSONL (.gz, .xz), Parquet.

Own readers, because a user whose file is malformed needs the path and the line.
"""

from __future__ import annotations

import codecs
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_trainer.data.template import missing_column
from dist_trainer.data.text_file import LongText, open_binary, text_parts, unreadable
from dist_trainer.errors import DataError

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]
"""(place, record): the place is what an error message names, such as "stories.jsonl:17"."""

PARQUET_ROWS_AT_A_TIME = 4096


def read_text(path: Path) -> Records:
    """One document: the whole file, under the column `text`; as a LongText if it is one."""
    parts = text_parts(path)
    text = next(parts, "")
    if next(parts, None) is not None:
        parts.close()
        yield str(path), {"text": LongText(path)}
    elif text.strip():
        yield str(path), {"text": text}


def read_jsonl(path: Path) -> Records:
    """One record a line; a .json file may also be one array of records."""
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if number == 1 and line.lstrip().startswith(b"["):
                    yield from _json_array(path, line + file.read())
                    return
                if line.strip():
                    yield f"{path}:{number}", _json_record(path, number, line)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(path, error) from error


def _json_record(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8 (byte {error.object[error.start]:#04x})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: not a JSON object ({error}); JSONL has one object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: a JSON {type(record).__name__}, not an object; JSONL has one object a line")
    return record


def _json_array(path: Path, content: bytes) -> Records:
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array of objects ({error})") from error
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(f"{path}: element {number} is a JSON {type(record).__name__}, not an object")
        yield f"{path} element {number}", record


def read_parquet(path: Path, columns: Sequence[str]) -> Records:
    """One record a row, with these columns only; a few thousand rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise missing_column(column, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=PARQUET_ROWS_AT_A_TIME, columns=list(columns)):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after row {row}: not UTF-8 (byte {error.object[error.start]:#04x})") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


READERS: dict[str, Callable[[Path], Records]] = {
    ".txt": read_text,
    ".text": read_text,
    ".md": read_text,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
}
DATA_SUFFIXES = (*READERS, ".parquet")
COMPRESSIONS = (".gz", ".xz")
OTHER_FORMATS = (".csv", ".tsv", ".zip", ".tar", ".tgz", ".zst", ".pdf", ".html", ".docx", ".arrow", ".bz2")


def format_suffix(path: Path) -> str:
    """`.jsonl` of stories.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_file(path: Path, columns: Sequence[str]) -> Records:
    """The records of `path`, by its suffix, with at least these columns; a file of unknown suffix is read as text."""
    suffix = format_suffix(path)
    if suffix in OTHER_FORMATS:
        known = ", ".join(DATA_SUFFIXES)
        raise DataError(f"{path}: files of type {suffix} are not read; convert it to one of {known} (also .gz, .xz)")
    return read_parquet(path, columns) if suffix == ".parquet" else READERS.get(suffix, read_text)(path)
