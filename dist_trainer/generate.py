"""`python -m dist_trainer.generate RUN`: text from a run's best checkpoint, or from any Hugging Face model, also of the Hub.

One prompt is continued on the terminal as the text is made. Without --prompt and --prompts_file it asks for prompts, or takes
the lines of standard input where that is no terminal. --prompts_file and --output write JSON lines. With --chat prompts are
answered, by the tokenizer's chat template.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dist_trainer.config.paths import user_path
from dist_trainer.distributed.launch_env import place_of_this_process
from dist_trainer.errors import EXIT_FINISHED, ConfigError, DataError, counted
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.tracking.formatting import printable
from dist_trainer.version import VERSION_LINE

if TYPE_CHECKING:
    from dist_trainer.generation.text import TextGenerator

DESCRIPTION = (
    "Text from a run's best checkpoint, or from any Hugging Face model, also of the Hub. Without --prompt and --prompts_file "
    "it asks for prompts, or takes the lines of standard input where that is no terminal."
)


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    given: dict[str, Any] = field(default_factory=dict)
    """What else stood beside it in a file of JSON lines; comes out again."""
    place: str = ""
    """`prompts.txt:3`, in a file."""


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command; its exit code."""
    return run_cli(lambda: generate_text(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError for numbers that make no sense, and for several ranks."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.generate",
        usage="%(prog)s RUN [--prompt TEXT | --prompts_file FILE] [--option VALUE]...",
        description=DESCRIPTION,
    )
    parser.add_argument("path", metavar="RUN", help="a run's folder, a checkpoint, a model's folder, or its name on the Hub")
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    parser.add_argument("--prompt", metavar="TEXT", help='beginning of the text; "": the model begins')
    parser.add_argument(
        "--prompts_file",
        metavar="FILE",
        type=user_path,
        help='a text file, one prompt a line; JSONL, CSV or Parquet: records with the text under "prompt"',
    )
    parser.add_argument("--output", metavar="FILE", type=user_path, help="file for JSON lines (default: standard output)")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer prompts by the tokenizer's chat template; those typed at a terminal form one conversation",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told before the first prompt")
    parser.add_argument("--max_new_tokens", metavar="N", type=int, default=200, help="at most this many (default: 200)")
    parser.add_argument(
        "--temperature", metavar="NUMBER", type=float, default=0.6, help="0: always the likeliest (default: 0.6)"
    )
    parser.add_argument("--top_k", metavar="N", type=int, help="draw from this many likeliest tokens only")
    parser.add_argument(
        "--top_p", metavar="NUMBER", type=float, default=0.8, help="draw from this much probability (default: 0.8)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="the same seed and prompt give the same text (default: 0)"
    )
    arguments = parser.parse_args(argv)
    ranks = place_of_this_process().world_size
    if ranks > 1:
        raise ConfigError(
            f"generate runs in one process, but the environment speaks of {ranks} ranks; start it "
            "without torchrun or srun, or unset their variables (RANK and WORLD_SIZE, or MASTER_ADDR)"
        )
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise ConfigError("--prompt and --prompts_file: give one of them")
    for name in ("prompt", "system"):
        refuse_broken_text(f"--{name}", getattr(arguments, name) or "")
    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system: is a message of a chat; add --chat, or put it at the beginning of --prompt")
    for name, smallest in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 1)):
        value = getattr(arguments, name)
        if value is not None and not smallest <= value < math.inf:
            raise ConfigError(f"--{name}: {value} must be {smallest} or more, and a finite number")
    if not -(2**63) <= arguments.seed < 2**64:
        raise ConfigError(f"--seed: {arguments.seed} must be a number of 64 bits")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top_p: {arguments.top_p} must be more than 0, and 1 at most")
    return arguments


def generate_text(arguments: argparse.Namespace) -> int:
    """Continue each prompt."""
    in_file = None if arguments.prompts_file is None else prompts_of(arguments.prompts_file)
    from dist_trainer.huggingface.initial_model import model_folder

    folder = model_folder(arguments.path, weights=True, key="RUN")

    import torch

    from dist_trainer.data.tokenizers import load_tokenizer
    from dist_trainer.distributed.context import keep_threads_within_quota
    from dist_trainer.generation.text import TextGenerator, chat_template
    from dist_trainer.huggingface.weights import find_model
    from dist_trainer.models.registry import open_model

    find_model(folder)  # who gives a wrong folder wants to hear of that first, not of the tokenizer it lacks
    tokenizer = load_tokenizer(str(folder), key="RUN")
    chat = chat_template(tokenizer, folder) if arguments.chat else None
    keep_threads_within_quota()
    model = open_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    writer = TextGenerator(model, tokenizer, arguments, chat=chat)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may have no such character
    with ExitStack() as open_files:
        if in_file is not None:
            refuse_prompts_without_answer(writer, in_file)
        if in_file is not None or arguments.output is not None:
            to = sys.stdout if arguments.output is None else open_files.enter_context(_opened(arguments.output))
            write_json_lines(writer, asked_for(arguments) if in_file is None else in_file, to)
        else:
            print_texts(writer, arguments)
    return EXIT_FINISHED


def write_json_lines(writer: TextGenerator, prompts: Iterator[Prompt] | list[Prompt], to: TextIO) -> None:
    """One object a prompt, as soon as its text is whole."""
    for prompt in prompts:
        written = writer.continuation(prompt.text)
        text = "".join(written)
        metadata = {"completion": text, "new_tokens": len(written.tokens), "ended_by": written.ended_by}
        print(json.dumps({**prompt.given, "prompt": prompt.text, **metadata}, ensure_ascii=False), file=to, flush=True)


def print_texts(writer: TextGenerator, arguments: argparse.Namespace) -> None:
    """Each prompt, and what continues it piece by piece as it is made; of a chat the answers alone."""
    asks = arguments.prompt is None and sys.stdin.isatty()
    shown = printable if sys.stdout.isatty() else str  # a terminal would obey control characters; a file wants them
    for prompt in asked_for(arguments):
        if writer.earlier and writer.lack_of_room(prompt.text):
            writer.earlier.clear()
            print(
                f"dist_trainer: the conversation fills the model's context of {writer.context}; a new one begins here",
                file=sys.stderr,
                flush=True,
            )
        problem = writer.lack_of_room(prompt.text)
        if problem and arguments.prompt is None:  # who types prompts can type another one
            print(f"dist_trainer: {problem}", file=sys.stderr, flush=True)
            continue
        if writer.chat is None:
            print(shown(prompt.text), end="", flush=True)
        written = writer.continuation(prompt.text)
        pieces = []
        try:
            for piece in written:
                pieces.append(piece)
                print(shown(piece), end="", flush=True)
        except KeyboardInterrupt:
            if not asks:
                raise
        print(flush=True)
        if asks and writer.chat is not None:
            writer.keep(prompt.text, "".join(pieces))
        if written.ended_by == "context":
            print(
                f"dist_trainer: stopped after {counted(len(written.tokens), 'new token')}, "
                f"where the model's context of {writer.context} ends",
                file=sys.stderr,
            )


def refuse_prompts_without_answer(writer: TextGenerator, prompts: list[Prompt]) -> None:
    """Raises ConfigError naming every prompt of a file that cannot be continued, before any other is."""
    problems = []
    for prompt in prompts:
        try:
            problem = writer.lack_of_room(prompt.text)
        except DataError as error:  # the chat template refuses it
            problem = str(error)
        if problem:
            problems.append(f"{prompt.place}: {problem}")
    if problems:
        raise ConfigError("--prompts_file: " + "\n  ".join(problems))


def asked_for(arguments: argparse.Namespace) -> Iterator[Prompt]:
    """The prompt on the command line; else what is typed until an empty line; else the lines of standard input."""
    if arguments.prompt is not None:
        yield Prompt(arguments.prompt)
    elif sys.stdin.isatty():
        while line := _ask():
            yield Prompt(line)
    else:
        try:
            for number, line in enumerate(sys.stdin, start=1):
                text = line.removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
                if text.strip():
                    refuse_broken_text(f"line {number} of standard input", text)
                    yield Prompt(text)
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is not UTF-8 text ({error})") from error


def refuse_broken_text(name: str, text: str) -> None:
    """Raises ConfigError if it was not UTF-8: Python hands on such bytes of arguments, and of input in some locales."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text (at place {error.start}: {error.object[error.start]!a})") from error


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises ConfigError where it cannot be read, naming every line that holds none."""
    from dist_trainer.data.prompts import read_prompts

    try:
        return [Prompt(record["prompt"], record, place) for place, record in read_prompts(path)]
    except DataError as error:
        raise ConfigError(f"--prompts_file: {error}") from error


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written ({error.strerror})") from error


def _ask() -> str:
    try:
        return input("prompt> ")
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
        return ""


if __name__ == "__main__":
    end_process(main())
