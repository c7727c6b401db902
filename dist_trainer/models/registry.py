"""`MODELS`: what can be trained by name, and how its weights come from a folder and go to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_trainer.config.lookup import build
from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import ConfigError
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.hf_format import WEIGHTS_FILE, locate_weights, read_hf_config, write_hf
from dist_trainer.models.meta import materialize, on_meta

SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)


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
    """Checkpoint whose weights will be loaded: nothing else needs to be read, init_from may be gone."""


def decoder_lm(config: ModelConfig, context: ModelContext) -> nn.Module:
    """A DecoderLM, initialised by context.seed or from the folder config.init_from."""
    if config.init_from is not None:
        return _from_folder(context.resumed_from or Path(config.init_from), config, context)
    with on_meta():
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


def _from_folder(folder: Path, config: ModelConfig, context: ModelContext) -> DecoderLM:
    """The weights in `folder`; the shape is the folder's, and the config must not contradict it."""
    if not folder.is_dir():
        raise ConfigError(f"model.init_from: {folder} is not a folder; give a run, a checkpoint or a Hugging Face model folder")
    folder = locate_weights(folder)
    described = read_hf_config(folder)
    problems = [
        f"model.{name}: is {asked!r}, but the model has {there!r}; set the key to that"
        for name in SHAPE_FIELDS
        if (asked := getattr(config, name)) != (there := getattr(described.config, name))
    ]
    if described.vocabulary_size < context.vocabulary_size:
        problems.append(
            f"data.tokenizer: has {context.vocabulary_size} tokens, the model knows {described.vocabulary_size}; "
            "use the model's own tokenizer (--data.tokenizer with the same folder)"
        )
    if described.max_position_embeddings < context.sequence_length:
        problems.append(
            f"data.sequence_length: is {context.sequence_length}, but the model was made for at most "
            f"{described.max_position_embeddings} positions"
        )
    if problems:
        raise ConfigError(f"model.init_from: the model in {folder} does not fit this config:\n  " + "\n  ".join(problems))
    return DecoderLM.from_pretrained(folder).to(context.device).train()


MODELS: dict[str, Callable[[ModelConfig, ModelContext], nn.Module]] = {"decoder_lm": decoder_lm}


def build_model(config: ModelConfig, context: ModelContext) -> nn.Module:
    """The model that `config.name` names, on context.device; the same on every rank."""
    return build(MODELS, config.name, "model.name", config, context, kind=nn.Module)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights that `weights_writer` wrote into `folder` back into `model`."""
    if isinstance(model, DecoderLM):
        model.load_weights(folder)
    else:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))


def weights_writer(model: nn.Module) -> Callable[[Mapping[str, Tensor], Path], None]:
    """How the weights of `model` are written: DecoderLM's as a Hugging Face folder, another module's as they are named.

    Beside the latter stand the configs that a Hugging Face model has, so that transformers opens the folder.
    """
    if isinstance(model, DecoderLM):
        config = model.hf_config()
        return lambda weights, folder: write_hf(folder, state=weights, config=config)
    configs = [getattr(model, name, None) for name in ("config", "generation_config")]
    describe = [save for config in configs if callable(save := getattr(config, "save_pretrained", None))]

    def write(weights: Mapping[str, Tensor], folder: Path) -> None:
        save_file(dict(weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        for save in describe:
            save(folder)

    return write
