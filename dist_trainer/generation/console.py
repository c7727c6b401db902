"""Prompts from a command line, a terminal, standard input or a file, and their continuations to a terminal or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dist_trainer.data.prompts import read_prompts
from dist_trainer.errors import ConfigError, DataError, counted
from dist_trainer.generation.text import TextGenerator
from dist_trainer.tracking.formatting import printable


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
    """Print each prompt and its continuation, piece by piece; of a chat, the answers only.

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
    """Raises ConfigError if the file cannot be read, naming every line without a prompt."""
    try:
        return [Prompt(record["prompt"], record, place) for place, record in read_prompts(path)]
    except DataError as error:
        raise ConfigError(f"--prompts_file: {error}") from error


def check_encoding(name: str, text: str) -> None:
    """Raises ConfigError if `text` was not UTF-8: Python passes such bytes of arguments on as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (at place {error.start}: {error.object[error.start]!a})") from error


def _warn(message: str) -> None:
    print(f"dist_trainer: {message}", file=sys.stderr, flush=True)
