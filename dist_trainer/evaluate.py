"""`python -m dist_trainer.evaluate RUN`: loss, perplexity and bits per byte of a model; with --harness, lm_eval's tasks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import RUN_CONFIG, is_run_folder, user_path
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.launch_env import rank_info
from dist_trainer.errors import EXIT_FINISHED, ConfigError
from dist_trainer.huggingface.model_files import CONFIG_FILE, find_config, read_description
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.version import VERSION_LINE

DESCRIPTION = "Loss, perplexity and bits per byte of a model on its run's validation data or on other data."
EPILOG = "Other arguments are training's keys and change the run's config (with --harness: only those of precision)."
FLAGS = {"--help", "--version", "--apply_chat_template"}
HARNESS_OPTIONS = ("harness_tasks", "limit", "num_fewshot", "batch_size", "apply_chat_template")
OWN_OPTIONS = {"--data", "--harness", *(f"--{name}" for name in HARNESS_OPTIONS)} | FLAGS
"""All others are training's keys."""
SECTIONS_WITHOUT_EFFECT = ("model", "optim", "schedule", "train", "checkpoint", "tracking", "profile")
"""Sections of the config that do not change what is measured."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line asks for."""

    path: Path
    """A model's folder, or its name on the Hub."""
    config: TrainingConfig
    """The run's config, changed by `--section.key VALUE`."""
    harness: dict[str, Any] | None = None
    """Fields of HarnessOptions; None: the loss on the config's data."""
    option_names: Mapping[str, str] = field(default_factory=dict)
    """Keys derived from this command's options, and these options: messages name them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    return run_cli(lambda: run(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> EvaluationRequest:
    """The command line. Raises ConfigError."""
    from dist_trainer.config.command_line import split_off_keys

    own_words, key_words = split_off_keys(sys.argv[1:] if argv is None else argv, own=OWN_OPTIONS, flags=FLAGS)
    arguments = argument_parser().parse_args(own_words)
    from dist_trainer.config.loading import assigned_keys
    from dist_trainer.huggingface.model_files import model_folder
    from dist_trainer.run.configure import load_config
    from dist_trainer.tracking.run_reader import run_folder_of

    keys = assigned_keys(key_words)
    harness = harness_fields(arguments, keys)
    folder = model_folder(arguments.path, weights=False, key="RUN")
    run = run_folder_of(folder, is_run=is_run_folder)
    if run is not None:
        # The checkpoint that the run started from may be gone.
        words = ["--config", str(run / RUN_CONFIG), "--checkpoint.resume", "auto"]
    else:
        context = None if "data.sequence_length" in keys else model_context(folder)
        words = [] if context is None else ["--data.sequence_length", str(context)]
    if arguments.data is not None:
        for key in ("validation.max_global_batches", "data.dataset_config", "data.validation_split"):
            words += [f"--{key}", "null"]
    if arguments.data == "":
        raise ConfigError("--data: must not be empty; name a dataset, or leave it out for the run's validation data")
    if any(word.partition("=")[0] == "--preset" for word in key_words):
        raise ConfigError("--preset: applies to training only; an existing model already has a size")
    # The tokenizer saved with the model has the chat template of its training.
    config = load_config([*words, "--data.tokenizer", str(folder), "--data.chat_template", "null", *key_words], trains=False)
    if harness is None:
        check_keys_have_effect(key_words)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, dataset=arguments.data, validation_dataset=arguments.data))
    option_names = {} if "data.tokenizer" in keys else {"data.tokenizer": "RUN"}
    if arguments.data is not None:
        option_names["data.validation_dataset"] = "--data"
    return EvaluationRequest(user_path(arguments.path), config, harness, option_names)


def argument_parser() -> argparse.ArgumentParser:
    """The parser of this command's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.evaluate",
        usage="%(prog)s RUN [--data NAME | --harness TASKS [options]] [--section.key VALUE]...",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN", help="a run, a checkpoint, a model folder, or a model's name on the Hub")
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="another dataset, as in data.dataset: its validation split, or all of it if it has none",
    )
    harness = parser.add_argument_group("EleutherAI's lm_eval (the extra `harness`; one process)")
    harness.add_argument(
        "--harness", metavar="TASKS", help="comma-separated tasks, groups or YAML files: lambada_openai,arc_easy"
    )
    harness.add_argument("--harness_tasks", metavar="FOLDER", type=user_path, help="folder with your own tasks, as YAML files")
    harness.add_argument("--limit", metavar="N", type=int, help="the first N questions of each task (default: all)")
    harness.add_argument("--num_fewshot", metavar="N", type=int, help="few-shot examples (default: the task's number)")
    harness.add_argument("--batch_size", metavar="N", type=int, help="batch size (default: 8)")
    harness.add_argument("--apply_chat_template", action="store_const", const=True, help="apply the chat template")
    return parser


def harness_fields(arguments: argparse.Namespace, keys: Collection[str]) -> dict[str, Any] | None:
    """The fields of HarnessOptions; None without --harness. Raises ConfigError for options and `keys` that contradict it."""
    options = {name: value for name in HARNESS_OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.harness is None:
        if options:
            raise ConfigError(f"--{next(iter(options))}: needs --harness TASKS")
        return None
    tasks = tuple(str(user_path(name)) for word in arguments.harness.split(",") if (name := word.strip()))
    if not tasks:
        raise ConfigError("--harness: names no task; give some, such as --harness lambada_openai,arc_easy")
    if arguments.data is not None:
        raise ConfigError("--data and --harness: give only one of them; a task has its own data")
    without_effect = sorted(key for key in keys if not key.startswith("precision."))
    if without_effect:
        raise ConfigError(f"{without_effect[0]}: has no effect with --harness; leave it out")
    for name, smallest in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        if name in options and options[name] < smallest:
            raise ConfigError(f"--{name}: {options[name]} must be {smallest} or more")
    ranks = rank_info().world_size
    if ranks > 1:
        raise ConfigError(
            f"--harness: runs in one process, but there are {ranks} ranks; start it without torchrun. For several GPUs give "
            "the checkpoint to lm_eval: `accelerate launch -m lm_eval --model hf --model_args pretrained=RUN/checkpoints/best`"
        )
    return {"tasks": tasks, "tasks_folder": options.pop("harness_tasks", None), **options}


def check_keys_have_effect(words: Sequence[str]) -> None:
    """Raises ConfigError for a key on the command line that has no effect; a --config file of training may hold such keys."""
    from dist_trainer.config.command_line import parse_argv

    without_effect = sorted(a.key for a in parse_argv(words).assignments if a.key.split(".")[0] in SECTIONS_WITHOUT_EFFECT)
    if without_effect:
        raise ConfigError(f"{without_effect[0]}: has no effect on the evaluation of an existing model; leave it out")


def model_context(path: Path) -> int | None:
    """The context length of the model at `path` by its config.json; None if that does not say."""
    folder = find_config(path)
    if folder is None:
        return None
    length = read_description(folder / CONFIG_FILE).get("max_position_embeddings")
    if length is None:  # transformers knows the other names that models have for it
        from dist_trainer.huggingface.transformers_models import context_length_of_folder

        length = context_length_of_folder(folder)
    return length if type(length) is int and length > 0 else None


def run(request: EvaluationRequest) -> int:
    """Evaluate, and print the result as one JSON object on rank 0; the exit code."""
    from dist_trainer.run.evaluation import HarnessOptions, evaluate_model, evaluate_tasks
    from dist_trainer.tracking.jsonl import encode_line

    if request.harness is not None:
        print(json.dumps(evaluate_tasks(request.path, HarnessOptions(**request.harness), request.config.precision)))
        return EXIT_FINISHED
    result = evaluate_model(request.path, request.config, request.option_names)
    if result is not None:
        print(encode_line(result).decode(), end="")
    return EXIT_FINISHED


if __name__ == "__main__":
    end_process(main())
