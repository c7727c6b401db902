"""`MODELS`: what can be trained by name, and how its weights come from a folder and go to one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_trainer.config.paths import user_path
from dist_trainer.config.registry import build
from dist_trainer.config.schema import SHAPE_FIELDS, ModelConfig
from dist_trainer.errors import CheckpointError, ConfigError, RefusedError, counted
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.initial_model import contradictions
from dist_trainer.huggingface.llama_config import add_eos_token, read_hf_config
from dist_trainer.huggingface.model_files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    find_intact_model,
    find_model,
    has_weights,
    model_folder,
)
from dist_trainer.huggingface.weights import materialize, meta_init, write_hf
from dist_trainer.models.decoder_lm import DecoderLM

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelContext:
    """What a model must fit: the tokenizer, the rows, the device."""

    vocabulary_size: int
    sequence_length: int
    seed: int
    device: torch.device
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    resumed_from: Path | None = None
    """Checkpoint that the trainer will bring back: only the shape is read here, from there, and init_from may be gone."""


def decoder_lm(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A DecoderLM, initialised by context.seed or from the folder config.init_from."""
    if config.init_from is not None:
        return _from_folder(config.init_from, config, context)
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


def _from_folder(init_from: str, config: ModelConfig, context: ModelContext) -> DecoderLM:
    """The weights in a folder; the shape is the folder's, and the config must not contradict it. No weights on resume."""
    folder = _folder_to_read(init_from, context)
    described = read_hf_config(folder)
    asked = {f"model.{name}": getattr(config, name) for name in SHAPE_FIELDS}
    problems = contradictions(asked, described.config, folder)
    problems += _lack_of_room(
        described.vocabulary_size, described.max_position_embeddings, context.vocabulary_size, context.sequence_length
    )
    if problems:
        raise ConfigError(f"model.init_from: the model in {folder} does not fit this config:\n  " + "\n  ".join(problems))
    ends = add_eos_token(described.token_ids["eos_token_id"], context.eos_token_id)
    described = replace(
        described,
        config=replace(described.config, dropout=config.dropout),
        token_ids={**described.token_ids, "eos_token_id": ends},
    )
    weights = folder if context.resumed_from is None else None
    model = DecoderLM.like(described, device=context.device, weights=weights)
    if weights is not None:
        model.load_weights(folder)
    return model


def _folder_to_read(init_from: str, context: ModelContext) -> Path:
    """Whose config.json says the shape: the checkpoint to go on from, else the model to start from, whose weights are whole."""
    if context.resumed_from is not None:
        return find_intact_model(context.resumed_from, weights=False)
    return find_intact_model(model_folder(init_from, weights=True))


def hf(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A causal language model of transformers: with the weights beside config.init_from's config.json, in float32; where it
    stands alone in a folder, with random ones, drawn from context.seed.
    """
    assert config.init_from is not None, "a rule of the config"
    folder = _folder_to_read(config.init_from, context)
    if context.resumed_from is not None:
        model = transformers_models.build_without_weights(folder)
    elif has_weights(folder):
        model = transformers_models.load_model(folder)
    elif user_path(config.init_from).is_dir():
        log.info("model.init_from: %s holds no weights: random ones, drawn from seed %d", folder, context.seed)
        model = transformers_models.init_model(folder, seed=context.seed)
        for name in ("bos_token_id", "eos_token_id"):  # the text's, no longer those of the model that config.json was for
            for settings in (model.config, model.generation_config):
                setattr(settings, name, getattr(context, name))
    else:
        raise CheckpointError(
            f"model.init_from: {config.init_from!r} has no {WEIGHTS_FILE} on the Hub, or not in the local cache"
        )
    refuse_lack_of_room(model, context.vocabulary_size, context.sequence_length, name=f"model.init_from: the model in {folder}")
    transformers_models.add_eos_token_to_model(model, context.eos_token_id)
    transformers_models.make_savable(model)
    return model.to(context.device).train()


def refuse_lack_of_room(model: nn.Module, vocabulary_size: int, sequence_length: int, *, name: str) -> None:
    """Raises ConfigError where rows of this length and vocabulary do not fit into the model, which messages call `name`."""
    if isinstance(model, DecoderLM):
        known_tokens, positions = model.vocabulary_size, model.max_position_embeddings
    elif transformers_models.is_transformers_model(model):
        known_tokens, positions = transformers_models.num_embeddings(model), transformers_models.context_length(model)
    else:
        return
    problems = _lack_of_room(known_tokens, positions, vocabulary_size, sequence_length)
    if problems:
        raise ConfigError(f"{name} does not fit this config:\n  " + "\n  ".join(problems))


def _lack_of_room(known_tokens: int, positions: int | None, vocabulary_size: int, sequence_length: int) -> list[str]:
    """A sentence for each way in which text would not fit into a model that is there already."""
    problems = []
    if known_tokens < vocabulary_size:
        problems.append(
            f"data.tokenizer: has {counted(vocabulary_size, 'token')}, the model knows {known_tokens}; use the model's own "
            "tokenizer (--data.tokenizer with its folder or name), or extend the model first (transformers' "
            "resize_token_embeddings, then save_pretrained, tokenizer beside it)"
        )
    if positions is not None and positions < sequence_length:
        problems.append(
            f"data.sequence_length: is {sequence_length}, but the model was made for at most {positions} positions; "
            f"set it to {positions} or less (--data.sequence_length {positions})"
        )
    return problems


MODELS: dict[str, Callable[[ModelConfig, ModelContext], nn.Module]] = {"decoder_lm": decoder_lm, "hf": hf}


def build_model(config: ModelConfig, context: ModelContext) -> nn.Module:
    """The model that `config.name` names, on context.device; the same on every rank."""
    return build(MODELS, config.name, "model.name", config, context, kind=nn.Module)


def fetch_initial_model(config: ModelConfig) -> None:
    """Bring the model that config.init_from names from the Hub into the local cache, if it is one of the Hub.

    Raises ConfigError.
    """
    if config.name in MODELS and config.init_from is not None:
        model_folder(config.init_from, weights=True)


def begins_trained(config: ModelConfig) -> bool:
    """Whether config.init_from brings weights, and not a shape alone."""
    if config.init_from is None or config.name != "hf":
        return config.init_from is not None
    folder = user_path(config.init_from)
    # What comes from the Hub has weights, or `hf` has refused it.
    return not folder.is_dir() or has_weights(find_model(folder))


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights that `make_weight_saver` wrote into `folder` back into `model`."""
    if isinstance(model, DecoderLM):
        model.load_weights(folder)
    elif transformers_models.is_transformers_model(model):
        transformers_models.load_weights(model, folder)
    else:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))


def open_model(path: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """The model in a run folder (its best checkpoint), a checkpoint or a Hugging Face folder, in float32, to be evaluated:
    a DecoderLM where it can represent it, else transformers' own.

    Raises ConfigError, CheckpointError.
    """
    folder = find_intact_model(user_path(str(path)))
    try:
        described = read_hf_config(folder)
    except ConfigError as error:
        if has_weights(folder):
            return transformers_models.load_model(folder).to(device).eval()
        raise CheckpointError(
            f"{folder} holds no weights ({WEIGHTS_FILE}) beside its {CONFIG_FILE}; give a folder with them, or fetch them from "
            f"the Hub anew (DecoderLM cannot be it: {error})"
        ) from error
    model = DecoderLM.like(described, device=device, weights=folder)
    model.load_weights(folder)
    return model.eval()


def can_open(path: Path) -> bool:
    """Whether `open_model` knows the kind of the model at `path`; its weights are not looked at."""
    try:
        folder = find_model(path)
    except RefusedError:
        return False
    try:
        read_hf_config(folder)
    except RefusedError:
        return transformers_models.is_causal_lm(folder)
    return True


def make_weight_saver(model: nn.Module) -> Callable[[Mapping[str, Tensor], Path], None]:
    """How the weights of `model` are written: as a Hugging Face folder, where it is DecoderLM or transformers' own; those of
    another module as they are named.
    """
    if isinstance(model, DecoderLM):
        config, generation = model.hf_config(), model.generation
        return lambda weights, folder: write_hf(folder, state=weights, config=config, generation=generation)
    if transformers_models.is_transformers_model(model):
        return lambda weights, folder: transformers_models.save_weights(model, weights, folder)
    return lambda weights, folder: save_file(dict(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
