"""Files of prompts: a text file with one per line, or records with a text under `prompt`, in any format of data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_trainer.data.records import OTHER_FORMATS, READERS, Record, format_suffix, read_file, read_jsonl, read_text
from dist_trainer.data.text_file import text_parts
from dist_trainer.errors import DataError

PROMPT = "prompt"


def read_prompts(path: Path) -> list[tuple[str, Record]]:
    """(place, record) of each prompt in a file; the record has its text under `prompt`.

    Raises DataError if the file cannot be read, or with a line for each record without a prompt.
    """
    prompts, problems = [], []
    for place, record in _records(path):
        problem = str(record) if isinstance(record, DataError) else _problem(place, record)
        if problem:
            problems.append(problem)
        elif not isinstance(record, DataError):
            prompts.append((place, record))
    if problems:
        raise DataError("\n  ".join(problems))
    if not prompts:
        raise DataError(f"{path}: there is no prompt in it")
    return prompts


def _records(path: Path) -> Iterator[tuple[str, Record | DataError]]:
    suffix = format_suffix(path)
    reader = READERS.get(suffix, read_text)
    if reader is read_jsonl:
        yield from _json_values(path)
    elif reader is not read_text or suffix in (".parquet", *OTHER_FORMATS):
        yield from read_file(path, [PROMPT])
    else:
        yield from ((f"{path}:{number}", {PROMPT: line}) for number, line in _lines(path))


def _json_values(path: Path) -> Iterator[tuple[str, Record | DataError]]:
    """Objects, or plain texts: one per line, or all in one array."""
    lines = list(_lines(path))
    if lines and lines[0][1].lstrip().startswith("["):
        try:
            values = json.loads("\n".join(line for _, line in lines))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON ({error})") from error
        yield from ((f"{path} element {number}", _as_record(value)) for number, value in enumerate(values, start=1))
        return
    for number, line in lines:
        try:
            yield f"{path}:{number}", _as_record(json.loads(line))
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", DataError(f"{path}:{number}: is not JSON ({error})")


def _as_record(value: Any) -> Record:
    return value if isinstance(value, dict) else {PROMPT: value}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; without byte order mark and line ends (\\n or \\r\\n)."""
    text = "".join(text_parts(path))
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _problem(place: str, record: Record) -> str:
    """What is wrong with the record; empty if it is valid."""
    if not isinstance(record.get(PROMPT), str):
        return f'{place}: has no text under "{PROMPT}"'
    try:  # it is written with the answer
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"{place}: half of a character (a lone surrogate, {error.object[error.start]!a}); remove it"
    return ""
