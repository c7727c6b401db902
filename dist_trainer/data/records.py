"""Records of local files, each with its location: text, JSONL and CSV, compressed or not, and Parquet.

These are our own readers, because users need the path and line of a malformed record. For a record that cannot be read, its
error is yielded, so that the caller can skip it.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from dist_trainer.data.templates import missing_column
from dist_trainer.data.text_file import COMPRESSIONS, READING_ERRORS, LongText, open_binary, text_parts, unreadable
from dist_trainer.errors import DataError, counted

Record = dict[str, Any]
Records = Iterator[tuple[str, Record | DataError]]
"""(place, record): the place is for messages, such as "stories.jsonl:17". An error in place of a record says why it cannot be
read."""

PARQUET_BATCH_ROWS = 4096
FIRST_BYTES = 1 << 20
"""How much is read of a file that may be an array of records, to find its columns."""


def read_text(path: Path) -> Records:
    """The file as one document, in the column `text`; a LongText if it is long."""
    parts = text_parts(path)
    text = next(parts, "")
    if next(parts, None) is not None:
        parts.close()
        yield str(path), {"text": LongText(path)}
    elif text.strip():
        yield str(path), {"text": text}


def read_jsonl(path: Path, text_column: str | None = None) -> Records:
    """One record per line; a .json file may also be an array of records. A plain string becomes a record with `text_column`."""
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if number == 1 and line.lstrip().startswith(b"["):
                    yield from _json_array(path, line + file.read(), text_column)
                    return
                if line.strip():
                    place = f"{path}:{number}"
                    yield place, _json_record(place, line, text_column)
    except READING_ERRORS as error:
        raise unreadable(path, error) from error


def _json_record(place: str, line: bytes, text_column: str | None) -> Record | DataError:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(place, error)
    except (ValueError, RecursionError) as error:
        return DataError(f"{place}: not a JSON object ({error}); JSONL has one object per line")
    return _as_record(place, value, text_column)


def _as_record(place: str, value: Any, text_column: str | None) -> Record | DataError:
    if isinstance(value, str) and text_column is not None:
        return {text_column: value}
    return value if isinstance(value, dict) else DataError(f"{place}: a JSON {type(value).__name__}, not an object")


def _not_utf8(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(f"{place}: not UTF-8 (byte {error.object[error.start]:#04x})")


def _json_array(path: Path, content: bytes, text_column: str | None) -> Records:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON array of objects ({error})") from error
    for number, value in enumerate(values, start=1):
        place = f"{path} element {number}"
        yield place, _as_record(place, value, text_column)


class _Lines:
    """The lines of a file as text. A line that is not UTF-8 raises, and reading can continue after it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.number = 0
        """Number of the line that was read last, from 1."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.number += 1
        return (line.removeprefix(codecs.BOM_UTF8) if self.number == 1 else line).decode("utf-8")


def read_csv(path: Path, delimiter: str) -> Records:
    """One record per line (a quoted value may span lines); the first line names the columns. Values are text."""
    csv.field_size_limit(sys.maxsize)
    try:
        with open_binary(path) as file:
            rows = _csv_rows(path, _Lines(file), delimiter)
            place, names = next(rows, ("", []))
            if isinstance(names, DataError):  # never skipped: the next line would be taken for the column names
                raise names
            columns = _column_names(path, names)
            for place, values in rows:
                if isinstance(values, DataError):
                    yield place, values
                elif len(values) == len(columns):
                    yield place, dict(zip(columns, values, strict=True))
                elif values:
                    mismatch = f"{counted(len(values), 'value')}, but line 1 names {counted(len(columns), 'column')}"
                    yield place, DataError(f"{place}: {mismatch}")
    except READING_ERRORS as error:
        raise unreadable(path, error) from error


def _csv_rows(path: Path, lines: _Lines, delimiter: str) -> Iterator[tuple[str, list[str] | DataError]]:
    """(place of its first line, values) of each row. An error in place of values says why the row cannot be read."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        place = f"{path}:{lines.number + 1}"
        try:
            yield place, next(rows)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            place = f"{path}:{lines.number}"
            yield place, _not_utf8(place, error)
        except csv.Error as error:
            yield place, DataError(f"{place}: not CSV ({error})")


def _column_names(path: Path, values: list[str]) -> list[str]:
    """Raises DataError if two are equal."""
    if duplicates := sorted({name for name in values if values.count(name) > 1}):
        raise DataError(f"{path}:1: two columns are named {duplicates[0]!r}; give each another name, in the first line")
    return values


def read_parquet(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Records:
    """One record per row, with these columns and the `optional` ones that exist. It holds a few thousand rows at a time."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise missing_column(column, file.schema_arrow.names, str(path))
            chosen = [*columns, *(column for column in optional if column in file.schema_arrow.names)]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=chosen):
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
    ".csv": partial(read_csv, delimiter=","),
    ".tsv": partial(read_csv, delimiter="\t"),
}
DATA_SUFFIXES = (*READERS, ".parquet")
OTHER_FORMATS = (".zip", ".tar", ".tgz", ".pdf", ".html", ".docx", ".arrow", ".xlsx", ".gzip", ".7z")
ALL_SUFFIXES = f"{', '.join(DATA_SUFFIXES)} (also {', '.join(COMPRESSIONS)})"
"""For messages."""


def column_names(path: Path) -> Collection[str]:
    """The columns of the file's first record; none if its beginning does not show them (errors are left to reading)."""
    reader = READERS.get(format_suffix(path), read_text)
    try:
        if format_suffix(path) == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_schema(path).names
        if reader is read_text:
            return ("text",)
        with open_binary(path) as file:
            head = file.read(FIRST_BYTES).decode("utf-8-sig", errors="replace").lstrip()
        if reader is not read_jsonl or not head.startswith("["):
            return next((record.keys() for _, record in reader(path) if isinstance(record, dict)), ())
        record, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())  # reading would load all of an array
    except (*READING_ERRORS, ValueError, RecursionError, DataError):
        return ()
    return record.keys() if isinstance(record, dict) else ()


def format_suffix(path: Path) -> str:
    """`.jsonl` for stories.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def format_of(path: Path) -> str:
    """The format in which `read_file` reads `path`. It is part of the digest: equal bytes read differently give different
    documents."""
    suffix, compression = format_suffix(path), path.suffix.lower()
    if suffix != ".parquet":
        reader = READERS.get(suffix, read_text)
        suffix = next(name for name, known in READERS.items() if known is reader)
    return suffix + (compression if compression in COMPRESSIONS else "")


def read_file(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Records:
    """The records of `path`, with at least these columns, and the `optional` ones that exist.

    Its suffix decides how it is read; files of unknown suffix are text.
    """
    suffix = format_suffix(path)
    if suffix in OTHER_FORMATS:
        raise DataError(f"{path}: files of type {suffix} are not read; convert it to one of {ALL_SUFFIXES}")
    return read_parquet(path, columns, optional) if suffix == ".parquet" else READERS.get(suffix, read_text)(path)
