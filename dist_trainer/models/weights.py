"""Loads and saves a model's weights: DecoderLM, transformers' models, and any other module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_trainer.config.paths import user_path
from dist_trainer.errors import CheckpointError, ConfigError, RefusedError
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.llama_config import read_hf_config
from dist_trainer.huggingface.model_files import CONFIG_FILE, WEIGHTS_FILE, find_model, find_valid_model, has_weights
from dist_trainer.huggingface.weights import to_hf_names, write_hf
from dist_trainer.models.decoder_lm import DecoderLM


def open_model(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a run folder (its best checkpoint), a checkpoint or a Hugging Face folder, in float32 and evaluation mode:
    a DecoderLM if it can represent the model, else transformers' own.

    Raises ConfigError, CheckpointError.
    """
    folder = find_valid_model(user_path(str(path)))
    try:
        hf_model = read_hf_config(folder)
    except ConfigError as error:
        if has_weights(folder):
            return transformers_models.load_model(folder).to(device).eval()
        raise CheckpointError(
            f"{folder} has no weights ({WEIGHTS_FILE}) next to its {CONFIG_FILE}; give a folder with weights, or download them "
            f"from the Hub again (not a model that DecoderLM can represent: {error})"
        ) from error
    return DecoderLM.from_hf_model(hf_model, weights=folder, device=device).eval()


def can_open(path: Path) -> bool:
    """Whether `open_model` supports the kind of model at `path`; does not look at its weights."""
    try:
        folder = find_model(path)
    except RefusedError:
        return False
    try:
        read_hf_config(folder)
    except RefusedError:
        return transformers_models.is_causal_lm(folder)
    return True


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights that `make_weight_saver` wrote into `folder` back into `model`."""
    if isinstance(model, DecoderLM):
        model.load_weights(folder)
    elif transformers_models.is_transformers_model(model):
        transformers_models.load_weights(model, folder)
    else:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))


def make_weight_saver(model: nn.Module) -> Callable[[Mapping[str, Tensor], Path], None]:
    """A function that writes weights of `model` into a folder: DecoderLM and transformers' models as a Hugging Face model,
    other modules' under their own names.
    """
    if isinstance(model, DecoderLM):
        config, generation = model.hf_config(), model.generation
        return lambda weights, folder: write_hf(folder, state=weights, config=config, generation=generation)
    if transformers_models.is_transformers_model(model):
        return lambda weights, folder: transformers_models.save_weights(model, weights, folder)
    return lambda weights, folder: save_file(dict(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def make_weight_namer(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
    """A function that gives weights of `model`, each in its own memory, the names that `make_weight_saver` gives them."""
    if isinstance(model, DecoderLM):
        return to_hf_names
    if transformers_models.is_transformers_model(model):
        return lambda weights: transformers_models.saved_tensors(model, weights)
    return lambda weights: weights
