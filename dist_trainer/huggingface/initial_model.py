"""Keys that model.init_from implies: the shape and tokenizer of the model to start from, unless the user has set them.

They are part of the config from the start, so that --print_config, config.yaml and the comparison on resume see the model's own
shape, not defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import LLAMA, SHAPE_FIELDS, TRANSFORMERS, ModelConfig
from dist_trainer.config.values import format_value
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.huggingface.llama_config import read_hf_config
from dist_trainer.huggingface.model_files import find_config, find_tokenizer, is_checkpoint, model_folder, model_folders


def derived_keys(keys: Mapping[str, Any], of_run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Values for the dotted keys of the model's shape and tokenizer that the user's `keys` leave open.

    `of_run`: the dotted keys of a run that started from the same model and is resumed; they take precedence, as the model may
    have been moved or changed. Raises ConfigError if a key that was set contradicts the model, if there is no model, or if
    model.name cannot train it.
    """
    name, init_from = keys.get("model.name", LLAMA), keys.get("model.init_from")
    if init_from is None or name not in (LLAMA, TRANSFORMERS):
        return {}
    if name == TRANSFORMERS and (problems := _keys_without_effect(keys)):
        raise ConfigError("\n".join(problems))
    shape = [f"model.{field}" for field in SHAPE_FIELDS] if name == LLAMA else []
    wanted = [key for key in (*shape, "data.tokenizer") if key not in keys]
    if of_run is not None and all(key in of_run for key in wanted):
        return {key: of_run[key] for key in wanted}
    if not wanted and not user_path(init_from).is_dir():
        return {}  # all keys are known: no need to ask the Hub, and a local folder may be gone
    folder = model_folder(init_from, weights=False)
    described_in = find_config(folder)
    if described_in is None:
        if not any(is_checkpoint(candidate) for candidate in model_folders(folder)):
            raise ConfigError(
                f"model.init_from: {folder} is neither a run with checkpoints, nor a checkpoint, nor a model's folder"
            )
        return {}  # a model of the user's own code; build_model reports whether it can be started from
    derived = _shape_in(described_in, keys) if name == LLAMA else {}
    if find_tokenizer(folder) is not None:
        derived["data.tokenizer"] = init_from
    return {key: derived[key] for key in wanted if key in derived}


def _keys_without_effect(keys: Mapping[str, Any]) -> list[str]:
    return [
        f"model.{name}: has no effect with model.name {TRANSFORMERS}, whose config.json determines it; leave the key out"
        for name in (*SHAPE_FIELDS, "dropout")
        if f"model.{name}" in keys
    ]


def _shape_in(folder: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    try:
        model = read_hf_config(folder).config
    except RefusedError as error:
        raise ConfigError(f"model.init_from: {error}") from error
    shape = {f"model.{name}": getattr(model, name) for name in SHAPE_FIELDS}
    problems = contradictions({key: keys[key] for key in shape if key in keys}, model, folder)
    if problems:
        raise ConfigError("\n".join(problems))
    return shape


def contradictions(keys: Mapping[str, Any], model: ModelConfig, folder: Path) -> list[str]:
    """A sentence for each of the dotted `keys` whose value is not that of `model`, which `folder` describes."""
    problems = []
    for key, value in keys.items():
        actual = getattr(model, key.removeprefix("model."))
        if key == "model.head_dim" and (value or model.head_size) == model.head_size:
            continue
        if value != actual:
            problems.append(
                f"{key}: is {format_value(value)}, but the model in {folder} has {format_value(actual)}; leave the key out, or "
                "set it to that"
            )
    return problems
