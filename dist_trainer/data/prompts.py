"""Files of prompts: a text file with one per line, or records with a text under `prompt`, in any format of datasets."""

from __future__ import annotations

import json
from pathlib import Path

from dist_trainer.data.records import OTHER_FORMATS, READERS, Record, Records, format_suffix, read_file, read_jsonl, read_text
from dist_trainer.data.text_file import text_parts
from dist_trainer.errors import DataError

PROMPT = "prompt"


def read_prompts(path: Path) -> list[tuple[str, Record]]:
    """(place, record) of each prompt in a file; the record has its text under `prompt`.

    Raises DataError if the file cannot be read, or with a line for each record without a prompt.
    """
    prompts, problems = [], []
    for place, record in _records(path):
        if isinstance(record, DataError):
            problems.append(str(record))
        elif problem := _problem(record):
            problems.append(f"{place}: {problem}")
        else:
            prompts.append((place, record))
    if problems:
        raise DataError("\n  ".join(problems))
    if not prompts:
        raise DataError(f"{path}: there is no prompt in it")
    return prompts


def _records(path: Path) -> Records:
    suffix = format_suffix(path)
    reader = READERS.get(suffix, read_text)
    if reader is read_jsonl:
        return read_jsonl(path, text_column=PROMPT)
    if reader is read_text and suffix not in (".parquet", *OTHER_FORMATS):
        return _lines(path)
    return read_file(path, [PROMPT])


def _lines(path: Path) -> Records:
    """The lines that are not blank, without line ends (\\n or \\r\\n)."""
    for number, line in enumerate("".join(text_parts(path)).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", {PROMPT: line.rstrip("\r")}


def _problem(record: Record) -> str:
    """What is wrong with the record; empty if it is valid."""
    if not isinstance(record.get(PROMPT), str):
        return f'has no text under "{PROMPT}"'
    try:  # it is written with the answer
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"half of a character (a lone surrogate, {error.object[error.start]!a}); remove it"
    return ""
