"""`python -m dist_trainer.generate RUN`: text from a run's best checkpoint, or from any Hugging Face Llama folder."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_trainer.errors import ConfigError
from dist_trainer.exit_codes import EXIT_FINISHED, exit_code_of


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command; its exit code."""
    return exit_code_of(lambda: generate_text(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError for a path that does not exist and numbers that make no sense."""
    parser = argparse.ArgumentParser(prog="python -m dist_trainer.generate", description=__doc__)
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or a model's folder")
    parser.add_argument("--prompt", help="beginning of the text; without it and --prompts_file: asks for prompts")
    parser.add_argument("--prompts_file", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="at most this many (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: 0.7)")
    parser.add_argument("--top_k", type=int, help="draw from this many likeliest tokens only")
    parser.add_argument("--top_p", type=float, default=0.8, help="draw from this much probability (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    arguments = parser.parse_args(argv)
    if not arguments.path.exists():
        raise ConfigError(f"{arguments.path} does not exist; give a run's folder, such as runs/default")
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
    """Print what continues each prompt, token by token."""
    import torch

    from dist_trainer.data.tokenization import load_tokenizer
    from dist_trainer.models.decoder_lm import DecoderLM

    model = DecoderLM.from_pretrained(arguments.path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(str(arguments.path))
    context = model.max_position_embeddings
    if arguments.prompts_file is not None and arguments.prompt is None:
        refuse_prompts_without_room(lines_of(arguments.prompts_file), tokenizer, context, arguments.prompts_file)
    asks = arguments.prompt is None and arguments.prompts_file is None
    try:
        for prompt in prompts(arguments):
            problem = lack_of_room(prompt, tokenizer, context)
            if problem and asks:  # who types prompts can type another one
                print(f"dist_trainer: {problem}", file=sys.stderr, flush=True)
                continue
            print(prompt, end="", flush=True)
            for piece in continuation(model, tokenizer, prompt, arguments):
                print(piece, end="", flush=True)
            print(flush=True)
    except BrokenPipeError:
        # Whoever reads, such as `head`, has had enough. What the interpreter flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_FINISHED


def lack_of_room(prompt: str, tokenizer: Any, context: int) -> str | None:
    """Why nothing can follow `prompt`; None where something can."""
    length = len(tokenizer.encode(prompt, add_special_tokens=False))
    if 0 < length < context:
        return None
    if length == 0:
        return "the prompt is empty: give it at least one token"
    return f"the prompt has {length} tokens; the model's context is {context}: shorten it"


def refuse_prompts_without_room(lines: list[str], tokenizer: Any, context: int, path: Path) -> None:
    """Raises ConfigError naming every line that cannot be continued, before any other is."""
    found = ((number, lack_of_room(line, tokenizer, context)) for number, line in enumerate(lines, start=1) if line.strip())
    problems = [f"line {number}: {problem}" for number, problem in found if problem]
    if problems:
        raise ConfigError(f"--prompts_file: {path}, " + "\n  ".join(problems))


def prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """The one on the command line, those in the file, or what is typed until an empty line or the end of input."""
    if arguments.prompt is not None:
        yield arguments.prompt
    elif arguments.prompts_file is not None:
        yield from (line for line in lines_of(arguments.prompts_file) if line.strip())
    else:
        while line := _ask():
            yield line


def lines_of(path: Path) -> list[str]:
    """The lines of a file of prompts. Raises ConfigError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts_file: {path} cannot be read ({error})") from error


def _ask() -> str:
    try:
        return input("prompt> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def continuation(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> Iterator[str]:
    """Pieces of text as they become whole: a character may need several tokens."""
    from dist_trainer.models.generation import generate

    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=False)
    tokens: list[int] = []
    shown = tokenizer.decode(prompt_tokens, skip_special_tokens=True)
    for token in generate(
        model,
        prompt_tokens,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        eos_token_id=tokenizer.eos_token_id,
    ):
        tokens.append(token)
        text = tokenizer.decode(prompt_tokens + tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    room = model.max_position_embeddings - len(prompt_tokens)
    if len(tokens) == room < arguments.max_new_tokens:
        print(
            f"dist_trainer: stopped after {room} new tokens, where the model's context of {model.max_position_embeddings} ends",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
