"""`python -m dist_trainer.evaluate RUN`: loss, perplexity and bits per byte of a run's best checkpoint, or of any model, on its
validation data, or on other data. With --harness: what EleutherAI's lm_eval finds on tasks by name.

Any number of ranks, started as for training, gives the same number.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.launch_env import place_of_this_process
from dist_trainer.errors import EXIT_FINISHED, ConfigError
from dist_trainer.huggingface.model_folders import model_folders
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.storage.manifest import read_json
from dist_trainer.tracking.jsonl_tracker import encode_line
from dist_trainer.version import VERSION_LINE

log = logging.getLogger(__name__)

DESCRIPTION = "Loss, perplexity and bits per byte of a model on its run's validation data, or on any other data."
EPILOG = "Other arguments are those of training and change the run's config (with --harness: those of precision alone)."
FLAGS = {"--help", "--version", "--apply_chat_template"}
HARNESS_OPTIONS = ("harness_tasks", "limit", "num_fewshot", "batch_size", "apply_chat_template")
OWN_OPTIONS = {"--data", "--harness", *(f"--{name}" for name in HARNESS_OPTIONS)} | FLAGS
"""The others are training's keys."""


DATA_TOKENIZER, DATA_VALIDATION = "data.tokenizer", "data.validation_dataset"
SECTIONS_OF_TRAINING = ("model", "optim", "schedule", "train", "checkpoint", "tracking", "profile")
"""Sections of the config that say how a model comes about, not what it is measured on."""


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated, and on what."""

    path: Path
    """Of the model: a folder, or a name on the Hub."""
    config: TrainingConfig
    """The run's own, changed by `--section.key VALUE`."""
    harness: dict[str, Any] | None = None
    """The fields of HarnessOptions; None: loss on the config's data."""
    typed: Mapping[str, str] = field(default_factory=dict)
    """What was typed for keys of the config that follow from this command's own arguments: messages name that."""


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command; its exit code."""
    return run_cli(lambda: run(parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> Asked:
    """The command line. Raises ConfigError."""
    # Values of training's keys must not be taken for RUN: they are split off before argparse sees them.
    own_words, rest = split_off_keys(sys.argv[1:] if argv is None else argv)
    arguments = argument_parser().parse_args(own_words)
    from dist_trainer.config.loading import keys_given
    from dist_trainer.huggingface.initial_model import model_folder
    from dist_trainer.run.configure import load_config
    from dist_trainer.tracking.run_reader import run_folder_of

    harness = harness_fields(arguments, keys_given(rest))
    folder = model_folder(arguments.path, weights=False, key="RUN")
    run = run_folder_of(folder, is_run=_is_run)
    if run is not None:
        # Where training began does not matter any more, and may have gone.
        given = ["--config", str(run / "config.yaml"), "--checkpoint.resume", "auto"]
    else:
        context = model_context(folder)
        asked = "data.sequence_length" in keys_given(rest)
        given = [] if context is None or asked else ["--data.sequence_length", str(context)]
    if arguments.data is not None:
        # Other data have no configuration of that name, and all of them is wanted, unless said otherwise.
        given += ["--validation.max_global_batches", "null", "--data.dataset_config", "null", "--data.validation_split", "null"]
    if arguments.data == "":
        raise ConfigError("--data: must not be empty; name a data set, or leave it out for the run's own validation data")
    if any(word.partition("=")[0] == "--preset" for word in rest):
        raise ConfigError("--preset: is for training; a model that is there has its size already")
    # The tokenizer that was saved with the model has the template of its training.
    config = load_config([*given, "--data.tokenizer", str(folder), "--data.chat_template", "null", *rest], trains=False)
    if harness is None:
        refuse_keys_without_effect(rest)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, dataset=arguments.data, validation_dataset=arguments.data))
    typed = {} if DATA_TOKENIZER in keys_given(rest) else {DATA_TOKENIZER: "RUN"}
    if arguments.data is not None:
        typed[DATA_VALIDATION] = "--data"
    return Asked(user_path(arguments.path), config, harness, typed)


def argument_parser() -> argparse.ArgumentParser:
    """Of the words that are this command's own."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.evaluate",
        usage="%(prog)s RUN [--data NAME | --harness TASKS [options]] [--section.key VALUE]...",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN", help="a run's folder, a checkpoint, a model's folder, or its name on the Hub")
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="other data, named as data.dataset is: its validation split, or all of it where it has none",
    )
    harness = parser.add_argument_group("EleutherAI's lm_eval (the extra `harness`; one process)")
    harness.add_argument(
        "--harness", metavar="TASKS", help="tasks, groups or YAML files, with commas between: lambada_openai,arc_easy"
    )
    harness.add_argument("--harness_tasks", metavar="FOLDER", type=user_path, help="where tasks of your own are, as YAML files")
    harness.add_argument("--limit", metavar="N", type=int, help="the first N questions of each task (default: all)")
    harness.add_argument("--num_fewshot", metavar="N", type=int, help="examples before each (default: the task's own number)")
    harness.add_argument("--batch_size", metavar="N", type=int, help="texts at a time (default: 8)")
    harness.add_argument("--apply_chat_template", action="store_const", const=True, help="ask by the tokenizer's chat template")
    return parser


def harness_fields(arguments: argparse.Namespace, keys: Collection[str]) -> dict[str, Any] | None:
    """The fields of HarnessOptions; None without --harness. Raises ConfigError for what contradicts it, such as any of the
    `keys` given that training alone reads.
    """
    given = {name: value for name in HARNESS_OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.harness is None:
        if given:
            raise ConfigError(f"--{next(iter(given))}: goes with --harness TASKS")
        return None
    tasks = tuple(str(user_path(name)) for word in arguments.harness.split(",") if (name := word.strip()))
    if not tasks:
        raise ConfigError("--harness: names no task; give some, such as --harness lambada_openai,arc_easy")
    if arguments.data is not None:
        raise ConfigError("--data and --harness: give one of them; a task has data of its own")
    without_effect = sorted(key for key in keys if not key.startswith("precision."))
    if without_effect:
        raise ConfigError(f"{without_effect[0]}: has no effect with --harness; leave it out")
    for name, smallest in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        if name in given and given[name] < smallest:
            raise ConfigError(f"--{name}: {given[name]} must be {smallest} or more")
    ranks = place_of_this_process().world_size
    if ranks > 1:
        raise ConfigError(
            f"--harness: runs in one process, but there are {ranks} ranks; start it without torchrun. On several GPUs lm_eval "
            "itself takes a checkpoint: `accelerate launch -m lm_eval --model hf --model_args pretrained=RUN/checkpoints/best`"
        )
    return {"tasks": tasks, "tasks_folder": given.pop("harness_tasks", None), **given}


def refuse_keys_without_effect(rest: Sequence[str]) -> None:
    """Raises ConfigError for a key that changes nothing here. A --config file may be that of training, and hold such keys."""
    from dist_trainer.config.cli import parse_argv

    without_effect = sorted(a.key for a in parse_argv(rest).assignments if a.key.split(".")[0] in SECTIONS_OF_TRAINING)
    if without_effect:
        raise ConfigError(f"{without_effect[0]}: has no effect on what is measured of a model that is there; leave it out")


def split_off_keys(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this command (RUN, --data NAME, --help), and those of training (`--section.key VALUE`)."""
    own, others, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        is_own = not word.startswith("--") or name in OWN_OPTIONS
        mine = own if is_own else others
        mine.append(word)
        takes_value = name.startswith("--") and name not in FLAGS and name != "--print_config"
        if takes_value and not equals and words and not words[0].startswith("--"):
            mine.append(words.pop(0))
    return own, others


def model_context(path: Path) -> int | None:
    """How many positions the model at `path` was made for, by its config.json; None where that does not say."""
    found = next((folder for folder in model_folders(path) if (folder / "config.json").is_file()), None)
    if found is None:
        return None
    length = read_json((found / "config.json").resolve()).get("max_position_embeddings")
    if length is None:  # models have other names for it, which only transformers knows
        from dist_trainer.huggingface.transformers_models import context_of_folder

        length = context_of_folder(found)
    return length if type(length) is int and length > 0 else None


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def run(asked: Asked) -> int:
    """Do what is asked for; print what was found as one JSON object, on rank 0."""
    if asked.harness is not None:
        print(json.dumps(evaluate_tasks(asked)))
    elif (found := evaluate_model(asked.path, asked.config, asked.typed)) is not None:
        print(encode_line(found).decode(), end="")
    return EXIT_FINISHED


def evaluate_model(path: Path, config: TrainingConfig, typed: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Loss, perplexity, bits per byte, and on how much; on rank 0. `typed`: as in Asked."""
    from dist_trainer.data.loader import create_validation_loader
    from dist_trainer.data.token_bytes import build_token_bytes
    from dist_trainer.data.tokenizers import configured_tokenizer, vocabulary_size
    from dist_trainer.distributed.collectives import local_rank0_first
    from dist_trainer.distributed.context import init_distributed
    from dist_trainer.huggingface.initial_model import model_folder
    from dist_trainer.huggingface.weights import find_model
    from dist_trainer.models.loss import model_loss
    from dist_trainer.models.registry import open_model, refuse_lack_of_room
    from dist_trainer.parallel.cpu.memory import keep_freed_memory
    from dist_trainer.tracking.run_log import configure_logging
    from dist_trainer.training.precision import build_precision, warn_of_emulated_bf16
    from dist_trainer.training.validation import evaluate

    tokenizer_key, data_key = ((typed or {}).get(key, key) for key in (DATA_TOKENIZER, DATA_VALIDATION))
    with init_distributed(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        if world.device.type == "cpu":
            keep_freed_memory()
        # Before data, which may take long; a model of the Hub so far without its weights.
        folder = local_rank0_first(world, lambda: model_folder(str(path), weights=True, key="RUN"))
        find_model(folder)
        tokenizer = local_rank0_first(world, lambda: configured_tokenizer(config.data, key=tokenizer_key))
        loader = create_validation_loader(config, world, tokenizer=tokenizer, key=data_key)
        model = open_model(folder, device=world.device)
        refuse_lack_of_room(model, vocabulary_size(tokenizer), config.data.sequence_length, name=f"{path}: the model")
        precision = build_precision(config.precision, world.device)
        if world.is_main:
            warn_of_emulated_bf16(precision, world.device)
        result = evaluate(
            model,
            loader,
            num_blocks=loader.sampler.num_blocks,  # type: ignore[attr-defined]
            world=world,
            precision=precision,
            loss_function=model_loss,
            token_bytes=build_token_bytes(tokenizer),
        )
        if not world.is_main or result is None:
            return None
        if result.bytes is None:
            log.info("bits per byte are null: this tokenizer's tokens do not spell exactly the text that they were made of")
        return {"data": config.data.validation_dataset or config.data.dataset, **result.metadata()}


def evaluate_tasks(asked: Asked) -> dict[str, Any]:
    """lm_eval's results by task and metric; all that it tells of them is kept in the run's folder."""
    from dist_trainer.huggingface.initial_model import model_folder
    from dist_trainer.huggingface.weights import locate_weights
    from dist_trainer.run.harness import HarnessOptions, run_harness, write_results
    from dist_trainer.tracking.run_log import configure_logging
    from dist_trainer.tracking.run_reader import run_folder_of

    configure_logging(None, rank=0)
    path = model_folder(str(asked.path), weights=True, key="RUN")
    found = run_harness(path, HarnessOptions(**(asked.harness or {})), asked.config.precision)
    folder = locate_weights(path).resolve()
    run = run_folder_of(path, is_run=_is_run)
    file = None if run is None else str(write_results(run, folder, found))
    return {"model": str(folder), "results": found["results"], "file": file}


if __name__ == "__main__":
    end_process(main())
