"""`python -m dist_trainer.generate RUN`: text from a run's best checkpoint, or from any Hugging Face Llama folder."""

from __future__ import annotations

import argparse
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
        if value is not None and value < smallest:
            raise ConfigError(f"--{name}: {value} must be {smallest} or more")
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
    for prompt in prompts(arguments):
        print(prompt, end="", flush=True)
        for piece in continuation(model, tokenizer, prompt, arguments):
            print(piece, end="", flush=True)
        print()
    return EXIT_FINISHED


def prompts(arguments: argparse.Namespace) -> Iterator[str]:
    """The one on the command line, those in the file, or what is typed until an empty line or the end of input."""
    if arguments.prompt is not None:
        yield arguments.prompt
    elif arguments.prompts_file is not None:
        try:
            lines = arguments.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts_file: {arguments.prompts_file} cannot be read ({error})") from error
        yield from (line for line in lines if line.strip())
    else:
        while line := _ask():
            yield line


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


if __name__ == "__main__":
    sys.exit(main())
