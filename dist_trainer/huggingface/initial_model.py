"""What model.init_from says: the keys that follow from the model to start from, where the user has not set them.

So that the config says the truth from the beginning: --print_config, config.yaml and the comparison at a resume see the
model's own shape, not defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import LLAMA, SHAPE_FIELDS, TRANSFORMERS, ModelConfig
from dist_trainer.config.values import format_value
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.huggingface.hub import is_hub_name, model_from_hub
from dist_trainer.huggingface.llama_config import read_hf_config
from dist_trainer.huggingface.model_files import CONFIG_FILE, check_model_folder
from dist_trainer.huggingface.model_folders import TOKENIZER_FILES, model_folders
from dist_trainer.storage.manifest import MANIFEST

_NO_FOLDER = "is not a folder; give a run, a checkpoint, a Hugging Face model folder, or a name on the Hub"


def derived_keys(asked: Mapping[str, Any], of_run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Values for keys that `asked` (dotted keys that the user has set) leaves open: the model's shape, and its tokenizer.

    `of_run`: the dotted keys of a run that started from the same model and is resumed; the model may have been moved or changed
    since, so these count. Raises ConfigError if a key that was set contradicts the model, if there is no model, or if
    model.name cannot train it.
    """
    name, init_from = asked.get("model.name", LLAMA), asked.get("model.init_from")
    if init_from is None or name not in (LLAMA, TRANSFORMERS):
        return {}
    if name == TRANSFORMERS and (problems := list(_keys_without_meaning(asked))):
        raise ConfigError("\n".join(problems))
    shape = [f"model.{field}" for field in SHAPE_FIELDS] if name == LLAMA else []
    wanted = [key for key in (*shape, "data.tokenizer") if key not in asked]
    if of_run is not None and all(key in of_run for key in wanted):
        return {key: of_run[key] for key in wanted}
    if not wanted and not user_path(init_from).is_dir():
        return {}  # nothing to ask the Hub for, or a folder that has gone since all keys were written down
    folder = model_folder(init_from, weights=False)
    described = described_in(folder)
    if described is None:
        if not any((found / MANIFEST).is_file() for found in model_folders(folder)):
            raise ConfigError(
                f"model.init_from: {folder} is neither a run with checkpoints, nor one of them, nor a model's folder"
            )
        return {}  # a model that its code alone describes: the assembly says what can be done with it
    found = _shape_in(described, asked) if name == LLAMA else {}
    if (tokenizer := _tokenizer_beside(folder, init_from)) is not None:
        found["data.tokenizer"] = tokenizer
    return {key: found[key] for key in wanted if key in found}


def model_folder(named: str, *, weights: bool, key: str = "model.init_from") -> Path:
    """The folder that model.init_from means, or RUN of a command (`key`, for messages), fetched from the Hub where it is a name
    there; `weights`: with them.

    Raises ConfigError, and CheckpointError as `check_model_folder` does.
    """
    path = user_path(named)
    if path.is_dir():
        check_model_folder(path)
        return path
    if path.exists() or not is_hub_name(named):
        raise ConfigError(f"{key}: {path} {_NO_FOLDER}")
    return model_from_hub(named, weights=weights, key=key)


def described_in(folder: Path) -> Path | None:
    """The folder with config.json that a run, a checkpoint or a model's folder means; None where there is none."""
    return next((found for found in model_folders(folder) if (found / CONFIG_FILE).is_file()), None)


def _keys_without_meaning(asked: Mapping[str, Any]) -> list[str]:
    """Of model.name hf: its config.json says everything."""
    return [
        f"model.{name}: has no meaning for model.name {TRANSFORMERS}, whose config.json says it; leave the key out"
        for name in (*SHAPE_FIELDS, "dropout")
        if f"model.{name}" in asked
    ]


def _shape_in(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    try:
        model = read_hf_config(folder).config
    except RefusedError as error:
        raise ConfigError(f"model.init_from: {error}") from error
    found = {f"model.{name}": getattr(model, name) for name in SHAPE_FIELDS}
    problems = contradictions({key: asked[key] for key in found if key in asked}, model, folder)
    if problems:
        raise ConfigError("\n".join(problems))
    return found


def contradictions(asked: Mapping[str, Any], model: ModelConfig, folder: Path) -> list[str]:
    """A sentence for each dotted key of `asked` whose value is not that of `model`, which `folder` describes."""
    problems = []
    for key, value in asked.items():
        there = getattr(model, key.removeprefix("model."))
        if key == "model.head_dim" and (value or model.head_size) == model.head_size:
            continue
        if value != there:
            problems.append(
                f"{key}: is {format_value(value)}, but the model in {folder} has {format_value(there)}; leave the key out, or "
                "set it to that"
            )
    return problems


def _tokenizer_beside(folder: Path, init_from: str) -> str | None:
    """What data.tokenizer must be for the model's own one; None where it has none."""
    if any((found / name).is_file() for found in model_folders(folder) for name in TOKENIZER_FILES):
        return init_from
    return None
