"""`MODELS`: the table of models that can be trained, and how each is built."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dist_trainer.config.paths import user_path
from dist_trainer.config.registry import build
from dist_trainer.config.schema import SHAPE_FIELDS, ModelConfig
from dist_trainer.errors import CheckpointError, ConfigError, counted
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.initial_model import contradictions
from dist_trainer.huggingface.llama_config import add_eos_token, read_hf_config
from dist_trainer.huggingface.model_files import WEIGHTS_FILE, find_model, find_valid_model, has_weights, model_folder
from dist_trainer.huggingface.weights import materialize, meta_init
from dist_trainer.models.decoder_lm import DecoderLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelContext:
    """What a model is built for: the tokenizer, the sequences, the device."""

    vocabulary_size: int
    sequence_length: int
    seed: int
    device: torch.device
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    resumed_from: Path | None = None
    """Checkpoint whose weights the trainer will restore. Only the shape is read from it here; init_from may be gone."""


def decoder_lm(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A DecoderLM, with random weights drawn from context.seed, or read from the folder config.init_from."""
    if config.init_from is not None:
        return _decoder_lm_from_folder(config.init_from, config, context)
    with meta_init():
        model = DecoderLM(
            config,
            context.vocabulary_size,
            context.sequence_length,
            bos_token_id=context.bos_token_id,
            eos_token_id=context.eos_token_id,
            pad_token_id=context.pad_token_id,
        )
    materialize(model, context.device)
    model.init_weights(context.seed)
    return model


def _decoder_lm_from_folder(init_from: str, config: ModelConfig, context: ModelContext) -> DecoderLM:
    """The folder's shape, which the config must not contradict, and its weights, unless the run resumes."""
    folder = _initial_folder(init_from, context)
    hf_model = read_hf_config(folder)
    problems = contradictions({f"model.{name}": getattr(config, name) for name in SHAPE_FIELDS}, hf_model.config, folder)
    problems += _misfits(
        hf_model.vocabulary_size, hf_model.max_position_embeddings, context.vocabulary_size, context.sequence_length
    )
    if problems:
        raise ConfigError(f"model.init_from: the model in {folder} does not fit this config:\n  " + "\n  ".join(problems))
    eos_token_id = add_eos_token(hf_model.token_ids["eos_token_id"], context.eos_token_id)
    hf_model = replace(
        hf_model,
        config=replace(hf_model.config, dropout=config.dropout),
        token_ids={**hf_model.token_ids, "eos_token_id": eos_token_id},
    )
    return DecoderLM.from_hf_model(hf_model, weights=folder if context.resumed_from is None else None, device=context.device)


def _initial_folder(init_from: str, context: ModelContext) -> Path:
    """The folder whose config.json defines the shape: the checkpoint to resume from, else the model to start from."""
    if context.resumed_from is not None:
        return find_valid_model(context.resumed_from, weights=False)
    return find_valid_model(model_folder(init_from, weights=True))


def hf(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A causal language model of transformers in float32, with the weights in config.init_from; if that is a local folder with
    a config.json only, with random weights drawn from context.seed.
    """
    assert config.init_from is not None, "a rule of the config"
    folder = _initial_folder(config.init_from, context)
    if context.resumed_from is not None:
        model = transformers_models.build_without_weights(folder)
    elif has_weights(folder):
        model = transformers_models.load_model(folder)
    elif user_path(config.init_from).is_dir():
        log.info("model.init_from: %s holds no weights: random ones, drawn from seed %d", folder, context.seed)
        model = transformers_models.init_model(folder, seed=context.seed)
        for name in ("bos_token_id", "eos_token_id"):  # the tokenizer's, not those in config.json
            for settings in (model.config, model.generation_config):
                setattr(settings, name, getattr(context, name))
    else:
        raise CheckpointError(
            f"model.init_from: {config.init_from!r} has no {WEIGHTS_FILE} on the Hub, or not in the local cache"
        )
    check_model_fits(model, context.vocabulary_size, context.sequence_length, name=f"model.init_from: the model in {folder}")
    transformers_models.add_eos_token_to_model(model, context.eos_token_id)
    transformers_models.make_savable(model)
    return model.to(context.device).train()


MODELS: dict[str, Callable[[ModelConfig, ModelContext], nn.Module]] = {"decoder_lm": decoder_lm, "hf": hf}


def build_model(config: ModelConfig, context: ModelContext) -> nn.Module:
    """The model that `config.name` names, on context.device; the same on every rank."""
    return build(MODELS, config.name, "model.name", config, context, kind=nn.Module)


def fetch_initial_model(config: ModelConfig) -> None:
    """Download the model that config.init_from names into the local cache, if it is on the Hub. Raises ConfigError."""
    if config.name in MODELS and config.init_from is not None:
        model_folder(config.init_from, weights=True)


def is_pretrained(config: ModelConfig) -> bool:
    """Whether config.init_from has weights, not only a shape."""
    if config.init_from is None or config.name != "hf":
        return config.init_from is not None
    folder = user_path(config.init_from)
    # A model on the Hub has weights, or `hf` has rejected it.
    return not folder.is_dir() or has_weights(find_model(folder))


def check_model_fits(model: nn.Module, vocabulary_size: int, sequence_length: int, *, name: str) -> None:
    """Raises ConfigError if `model`, which messages call `name`, has too few tokens or positions for the data."""
    if isinstance(model, DecoderLM):
        known_tokens, positions = model.vocabulary_size, model.max_position_embeddings
    elif transformers_models.is_transformers_model(model):
        known_tokens, positions = transformers_models.num_embeddings(model), transformers_models.context_length(model)
    else:
        return
    if problems := _misfits(known_tokens, positions, vocabulary_size, sequence_length):
        raise ConfigError(f"{name} does not fit this config:\n  " + "\n  ".join(problems))


def _misfits(known_tokens: int, positions: int | None, vocabulary_size: int, sequence_length: int) -> list[str]:
    """A sentence for each way in which the data does not fit a model of `known_tokens` and `positions`."""
    problems = []
    if known_tokens < vocabulary_size:
        problems.append(
            f"data.tokenizer: has {counted(vocabulary_size, 'token')}, the model knows {known_tokens}; use the model's own "
            "tokenizer (--data.tokenizer with its folder or name), or extend the model first (transformers' "
            "resize_token_embeddings, then save_pretrained, with the tokenizer in the same folder)"
        )
    if positions is not None and positions < sequence_length:
        problems.append(
            f"data.sequence_length: is {sequence_length}, but the model was made for at most {positions} positions; "
            f"set it to {positions} or less (--data.sequence_length {positions})"
        )
    return problems
