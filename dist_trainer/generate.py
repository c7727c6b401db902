"""`python -m dist_trainer.generate RUN`: generate text with a run's best checkpoint or any Hugging Face model."""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from dist_trainer.config.paths import user_path
from dist_trainer.distributed.launch_env import rank_info
from dist_trainer.errors import EXIT_FINISHED, ConfigError
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.version import VERSION_LINE

DESCRIPTION = (
    "Generate text with a run's best checkpoint or any Hugging Face model (folder or Hub name). Without --prompt and "
    "--prompts_file it asks for prompts, or reads lines from standard input if that is not a terminal."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    return run_cli(lambda: generate_text(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError for values out of range, and for more than one rank."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.generate",
        usage="%(prog)s RUN [--prompt TEXT | --prompts_file FILE] [--option VALUE]...",
        description=DESCRIPTION,
    )
    parser.add_argument("path", metavar="RUN", help="a run, a checkpoint, a model folder, or a model's name on the Hub")
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    parser.add_argument("--prompt", metavar="TEXT", help='text to continue; "": start from scratch')
    parser.add_argument(
        "--prompts_file",
        metavar="FILE",
        type=user_path,
        help='text file with one prompt per line, or JSONL, CSV or Parquet with a "prompt" column',
    )
    parser.add_argument("--output", metavar="FILE", type=user_path, help="write JSON lines here (default: standard output)")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="answer prompts with the chat template; prompts typed at a terminal form one conversation",
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max_new_tokens", metavar="N", type=int, default=200, help="most new tokens (default: 200)")
    parser.add_argument(
        "--temperature", metavar="NUMBER", type=float, default=0.6, help="sampling temperature; 0 = greedy (default: 0.6)"
    )
    parser.add_argument("--top_k", metavar="N", type=int, help="sample from the k most likely tokens")
    parser.add_argument(
        "--top_p", metavar="NUMBER", type=float, default=0.8, help="nucleus (top-p) sampling threshold (default: 0.8)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="random seed; same seed and prompt, same text (default: 0)"
    )
    arguments = parser.parse_args(argv)
    ranks = rank_info().world_size
    if ranks > 1:
        raise ConfigError(
            f"generate runs in one process, but the environment describes {ranks} ranks; start it "
            "without torchrun or srun, or unset their variables (RANK and WORLD_SIZE, or MASTER_ADDR)"
        )
    if arguments.prompt is not None and arguments.prompts_file is not None:
        raise ConfigError("--prompt and --prompts_file: give only one of them")
    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system: needs --chat; add it, or put the text at the beginning of --prompt")
    for name, smallest in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 1)):
        value = getattr(arguments, name)
        if value is not None and not smallest <= value < math.inf:
            raise ConfigError(f"--{name}: {value} must be {smallest} or more, and a finite number")
    if not -(2**63) <= arguments.seed < 2**64:
        raise ConfigError(f"--seed: {arguments.seed} must fit in 64 bits")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top_p: {arguments.top_p} must be more than 0 and at most 1")
    return arguments


def generate_text(arguments: argparse.Namespace) -> int:
    """Continue each prompt; the exit code."""
    import torch

    from dist_trainer.data.tokenizers import load_tokenizer
    from dist_trainer.distributed.context import keep_threads_within_quota
    from dist_trainer.generation import console
    from dist_trainer.generation.decoding import DecodingOptions
    from dist_trainer.generation.text import TextGenerator, chat_template
    from dist_trainer.huggingface.model_files import find_model, model_folder
    from dist_trainer.models.weights import open_model

    for name in ("prompt", "system"):
        console.check_encoding(f"--{name}", getattr(arguments, name) or "")
    in_file = None if arguments.prompts_file is None else console.prompts_of_file(arguments.prompts_file)
    folder = model_folder(arguments.path, weights=True, key="RUN")
    find_model(folder)  # a wrong folder is reported before the tokenizer that it lacks
    tokenizer = load_tokenizer(str(folder), key="RUN")
    chat = chat_template(tokenizer, folder) if arguments.chat else None
    keep_threads_within_quota()
    model = open_model(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    options = DecodingOptions(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    generator = TextGenerator(model, tokenizer, options, chat=chat, system=arguments.system)
    is_interactive = arguments.prompt is None and in_file is None and sys.stdin.isatty()
    if in_file is not None:
        console.check_prompts(generator, in_file)
        prompts = in_file
    elif arguments.prompt is not None:
        prompts = [console.Prompt(arguments.prompt)]
    else:
        prompts = console.typed_prompts() if is_interactive else console.prompts_of_stdin()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for characters that the terminal's encoding lacks
    with ExitStack() as open_files:
        if in_file is None and arguments.output is None:
            console.print_texts(generator, prompts, is_interactive=is_interactive)
        else:
            to = sys.stdout if arguments.output is None else open_files.enter_context(_opened(arguments.output))
            console.write_json_lines(generator, prompts, to)
    return EXIT_FINISHED


def _opened(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    end_process(main())
