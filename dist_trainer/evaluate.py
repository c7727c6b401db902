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

from dist_trainer.config.loading import load_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.exit_codes import EXIT_FINISHED, exit_code_of

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
        "--data", help="other data, named as data.dataset is: its validation split, or all of it where it has none"
    )
    arguments, rest = parser.parse_known_args(argv)
    path: Path = arguments.path
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a run's folder, such as runs/default")
    own = next((folder / "config.yaml" for folder in (path, *path.resolve().parents[:2]) if _is_run(folder)), None)
    given = ["--config", str(own)] if own else ["--data.tokenizer", str(path)]
    if arguments.data is not None:
        # Other data have no configuration of that name, and all of them is wanted, unless said otherwise.
        given += ["--validation.max_batches", "null", "--data.dataset_config", "null"]
    config = load_config([*given, "--data.tokenizer", str(path), *rest])
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, dataset=arguments.data, validation_dataset=arguments.data))
    return path, config


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def evaluate_model(path: Path, config: TrainingConfig) -> int:
    """Print loss, perplexity and tokens as one JSON object, on rank 0."""
    from dist_trainer.data.loader import create_validation_loader
    from dist_trainer.distributed.world import World
    from dist_trainer.evaluation import evaluate
    from dist_trainer.models.decoder_lm import DecoderLM
    from dist_trainer.models.loss import model_loss
    from dist_trainer.precision import build_precision
    from dist_trainer.tracking.run_log import configure_logging

    with World.join(config.distributed) as world:
        configure_logging(None, rank=world.rank)
        loader = create_validation_loader(config, world)
        result = evaluate(
            DecoderLM.from_pretrained(path).to(world.device),
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
