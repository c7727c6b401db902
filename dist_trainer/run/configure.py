"""Builds a TrainingConfig from a command line, the launcher, the initial model and an earlier run. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_trainer.config.loading import config_from_argv
from dist_trainer.config.paths import RUN_CONFIG, has_checkpoints, is_same_path, sweep_run_name, user_path
from dist_trainer.config.schema import LLAMA, TrainingConfig
from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.distributed.launch_env import rank_info
from dist_trainer.errors import ConfigError
from dist_trainer.huggingface.initial_model import derived_keys


def load_config(argv: Sequence[str] | None = None, *, trains: bool = True) -> TrainingConfig:
    """The config of the command line `argv` (default: this process's); later files and arguments override earlier ones.

    `trains`: whether a run follows, so that the global batch must divide evenly among the ranks. `--help`, `--version`,
    `--print_config` and `--print_completion` print and raise SystemExit(0). Raises ConfigError with every problem found.
    """
    return config_from_argv(
        argv,
        trains=trains,
        count_ranks=lambda: rank_info().world_size,
        derive_keys=lambda keys: derived_keys(keys, _keys_of_earlier_run(keys)),
    )


def _keys_of_earlier_run(keys: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dotted model and data keys of the run that a config with these `keys` resumes; None if it resumes none, or if that
    run started from another model.
    """
    defaults = TrainingConfig()
    run_name = sweep_run_name(keys.get("run_name", defaults.run_name))
    folder = user_path(keys.get("output_dir", defaults.output_dir)) / run_name
    is_resumed = keys.get("checkpoint.resume") != "never" and has_checkpoints(folder)
    if "model.init_from" not in keys or not is_resumed:
        return None
    try:
        file = folder / RUN_CONFIG
        saved = load_yaml(file.read_text(encoding="utf-8"), str(file))
        of_run = {f"{section}.{name}": value for section in ("model", "data") for name, value in saved[section].items()}
    except (OSError, ValueError, ConfigError, KeyError, TypeError, AttributeError):
        return None
    is_same_model = of_run.get("model.name") == keys.get("model.name", LLAMA) and is_same_path(
        of_run.get("model.init_from"), keys["model.init_from"]
    )
    return of_run if is_same_model else None
