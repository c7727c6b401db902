"""`python -m dist_trainer.evaluate RUN`: the loss of a run's best checkpoint on its validation data, or on other data.

Any number of ranks, started as for training, gives the same number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dist_trainer.config.loading import keys_given, load_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.exit_codes import EXIT_FINISHED, exit_code_of
from dist_trainer.manifest import read_json
from dist_trainer.model_folders import model_folders
from dist_trainer.tracking.run_history import run_folder_of

DESCRIPTION = "Loss and perplexity of a model on its run's validation data, or on any other data."


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command; its exit code."""
    return exit_code_of(lambda: evaluate_model(*parse_arguments(argv)))


def parse_arguments(argv: Sequence[str] | None) -> tuple[Path, TrainingConfig]:
    """The model's folder, and the config to evaluate it by: the run's own, changed by `--section.key VALUE`."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.evaluate",
        usage="%(prog)s RUN [--data NAME] [--section.key VALUE]...",
        description=DESCRIPTION,
        epilog="Other arguments are those of training and change the run's config.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN", type=Path, help="a run's folder, a checkpoint, or a model's folder")
    parser.add_argument(
        "--data",
        metavar="NAME",
        help="other data, named as data.dataset is: its validation split, or all of it where it has none",
    )
    # Values of training's keys must not be taken for RUN: they are split off before argparse sees them.
    own_words, rest = split_off_keys(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(own_words)
    path: Path = arguments.path
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a run's folder, such as runs/default")
    run = run_folder_of(path, is_run=_is_run)
    if run is not None:
        given = ["--config", str(run / "config.yaml")]
    else:
        context = model_context(path)
        asked = "data.sequence_length" in keys_given(rest)
        given = [] if context is None or asked else ["--data.sequence_length", str(context)]
    if arguments.data is not None:
        # Other data have no configuration of that name, and all of them is wanted, unless said otherwise.
        given += ["--validation.max_batches", "null", "--data.dataset_config", "null"]
    if any(word.partition("=")[0] == "--preset" for word in rest):
        raise ConfigError("--preset: is for training; a model that is there has its size already")
    # The tokenizer that was saved with the model has the template of its training.
    config = load_config([*given, "--data.tokenizer", str(path), "--data.chat_template", "null", *rest])
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, dataset=arguments.data, validation_dataset=arguments.data))
    return path, config


def split_off_keys(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this command (RUN, --data NAME, --help), and those of training (`--section.key VALUE`)."""
    own, others, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, _ = word.partition("=")
        is_own = not word.startswith("--") or name in ("--data", "--help")
        mine = own if is_own else others
        mine.append(word)
        takes_value = name == "--data" or not (is_own or name == "--print_config")
        if takes_value and not equals and words and not words[0].startswith("--"):
            mine.append(words.pop(0))
    return own, others


def model_context(path: Path) -> int | None:
    """How many positions the model at `path` was made for, by its config.json; None where that does not say."""
    found = next((folder for folder in model_folders(path) if (folder / "config.json").is_file()), None)
    length = read_json((found / "config.json").resolve()).get("max_position_embeddings") if found else None
    return length if type(length) is int and length > 0 else None


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def evaluate_model(path: Path, config: TrainingConfig) -> int:
    """Print loss, perplexity and tokens as one JSON object, on rank 0."""
    from dist_trainer.data.loader import create_validation_loader
    from dist_trainer.distributed.world import World
    from dist_trainer.evaluation import evaluate
    from dist_trainer.models.loss import model_loss
    from dist_trainer.models.registry import open_model
    from dist_trainer.precision import build_precision
    from dist_trainer.tracking.run_log import configure_logging

    with World.join(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        loader = create_validation_loader(config, world)
        result = evaluate(
            open_model(path, device=world.device),
            loader,
            num_blocks=loader.sampler.num_blocks,  # type: ignore[attr-defined]
            world=world,
            precision=build_precision(config.precision, world.device),
            loss_function=model_loss,
        )
        if world.is_main and result is not None:
            found = {"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}
            print(json.dumps({"data": config.data.validation_dataset or config.data.dataset, **found}))
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
