"""Reads prompts (command line, terminal, standard input or file); writes continuations to a terminal or as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dist_trainer.data.records import OTHER_FORMATS, READERS, Record, Records, format_suffix, read_file, read_jsonl, read_text
from dist_trainer.data.text_file import text_parts
from dist_trainer.errors import ConfigError, DataError, counted
from dist_trainer.generation.text import TextGenerator
from dist_trainer.tracking.formatting import printable

PROMPT = "prompt"
"""The column of the text."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    record: dict[str, Any] = field(default_factory=dict)
    """The other fields of its record in a prompts file; they are written to the output too."""
    place: str = ""
    """`prompts.txt:3`, in a file."""


def write_json_lines(generator: TextGenerator, prompts: Iterable[Prompt], to: TextIO) -> None:
    """One object per prompt, as soon as its text is complete."""
    for prompt in prompts:
        stream = generator.stream(prompt.text)
        completion = "".join(stream)
        line = {"completion": completion, "new_tokens": len(stream.new_tokens), "ended_by": stream.ended_by}
        print(json.dumps({**prompt.record, "prompt": prompt.text, **line}, ensure_ascii=False), file=to, flush=True)


def print_texts(generator: TextGenerator, prompts: Iterable[Prompt], *, is_interactive: bool) -> None:
    """Print each prompt and its continuation, piece by piece; in a chat, only the answers.

    `is_interactive`: prompts are typed at a terminal. They form one conversation of a chat, and Ctrl-C ends one answer.
    Raises ConfigError for a prompt that is too long, unless the next one can be typed or read.
    """
    shown = printable if sys.stdout.isatty() else str  # a terminal would obey control characters; a file keeps them
    for prompt in prompts:
        if generator.history and generator.length_problem(prompt.text):
            generator.history.clear()
            _warn(f"the conversation has filled the model's context of {generator.context_length}; starting a new one")
        problem = generator.length_problem(prompt.text)
        if problem and prompt.place:
            _warn(problem)
            continue
        if generator.chat is None:
            print(shown(prompt.text), end="", flush=True)
        stream = generator.stream(prompt.text)
        pieces = []
        try:
            for piece in stream:
                pieces.append(piece)
                print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not is_interactive:
                raise
        print(flush=True)
        if is_interactive and generator.chat is not None:
            generator.remember(prompt.text, "".join(pieces))
        if stream.ended_by == "context":
            tokens = counted(len(stream.new_tokens), "new token")
            _warn(f"stopped after {tokens}: the model's context of {generator.context_length} is full")


def check_prompts(generator: TextGenerator, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError naming every prompt of a file that cannot be continued."""
    problems = []
    for prompt in prompts:
        try:
            problem = generator.length_problem(prompt.text)
        except DataError as error:  # from the chat template
            problem = str(error)
        if problem:
            problems.append(f"{prompt.place}: {problem}")
    if problems:
        raise ConfigError("--prompts_file: " + "\n  ".join(problems))


def typed_prompts() -> Iterator[Prompt]:
    """Prompts typed at the terminal, until an empty line."""
    while True:
        try:
            text = input("prompt> ")
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if not text:
            return
        yield Prompt(text, place="terminal")


def prompts_of_stdin() -> Iterator[Prompt]:
    """The lines of standard input that are not blank. Raises ConfigError if they are not UTF-8."""
    try:
        for number, line in enumerate(sys.stdin, start=1):
            text = line.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
            if text.strip():
                place = f"line {number} of standard input"
                check_encoding(place, text)
                yield Prompt(text, place=place)
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text ({error})") from error


def prompts_of_file(path: Path) -> list[Prompt]:
    """The prompts in a text file, one per line, or in records with a text under `prompt`, in any format of datasets.

    Raises ConfigError if the file cannot be read, or with a line for each record without a prompt.
    """
    prompts, problems = [], []
    try:
        for place, record in _records(path):
            if isinstance(record, DataError):
                problems.append(str(record))
            elif problem := _problem(record):
                problems.append(f"{place}: {problem}")
            else:
                prompts.append(Prompt(record[PROMPT], record, place))
    except DataError as error:
        problems = [str(error)]
    if not prompts and not problems:
        problems = [f"{path}: it contains no prompt"]
    if problems:
        raise ConfigError("--prompts_file: " + "\n  ".join(problems))
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


def check_encoding(name: str, text: str) -> None:
    """Raises ConfigError if `text` was not UTF-8: Python passes such bytes of arguments on as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (at place {error.start}: {error.object[error.start]!a})") from error


def _warn(message: str) -> None:
    print(f"dist_trainer: {message}", file=sys.stderr, flush=True)
