"""Folders in the format of Hugging Face's LlamaForCausalLM; written and read without transformers, a slow import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.manifest import MANIFEST, read_json, verify
from dist_trainer.model_folders import model_folders

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_PREFIX, _HEAD = "model.", "lm_head.weight"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
REPRESENTED_TYPES = ("llama", "mistral")
_WHOLE_NUMBERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)
_MOST = 1 << 31


@dataclass(frozen=True)
class HFModel:
    """What config.json says of a model."""

    config: ModelConfig
    vocabulary_size: int
    max_position_embeddings: int
    token_ids: Mapping[str, int | None]


def hf_config(model: HFModel) -> dict[str, Any]:
    """The contents of config.json; readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    config = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        **model.token_ids,
    }


def write_hf(folder: Path, *, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write config.json, generation_config.json and model.safetensors; `state` is a DecoderLM's state_dict."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"_from_model_config": True, **{key: config.get(key) for key in _TOKEN_IDS}}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_file(to_hf_names(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def to_hf_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DecoderLM's tensors under LlamaForCausalLM's names."""
    return {name if name == _HEAD else _PREFIX + name: tensor.contiguous() for name, tensor in state.items()}


def from_hf_names(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """LlamaForCausalLM's tensors under DecoderLM's names."""
    for name, tensor in tensors:
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints still carry
            yield name.removeprefix(_PREFIX), tensor


def read_hf_config(folder: Path) -> HFModel:
    """The model that `folder`/config.json describes; ConfigError names a field that DecoderLM cannot represent."""
    path = folder / CONFIG_FILE
    raw = _read_json(path)
    _refuse_what_differs(raw, path)
    _refuse_wrong_types(raw, path)
    try:
        config = ModelConfig(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(_rope(raw).get("rope_theta", raw.get("rope_theta", 10000.0))),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
        )
        token_ids = {key: _first(raw.get(key)) for key in _TOKEN_IDS}
        return HFModel(config, raw["vocab_size"], raw.get("max_position_embeddings", 2048), token_ids)
    except KeyError as error:
        raise ConfigError(f"{path}: the field {error} is missing") from error


def _refuse_what_differs(raw: Mapping[str, Any], path: Path) -> None:
    def refuse(field: str, value: object, can: str) -> None:
        raise ConfigError(f"{path}: {field} is {value!r}; DecoderLM can represent {can} only")

    if raw.get("model_type") not in REPRESENTED_TYPES:
        refuse("model_type", raw.get("model_type"), " and ".join(REPRESENTED_TYPES))
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "silu")
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            refuse(field, raw[field], "false")
    if raw.get("model_type") == "mistral" and raw.get("sliding_window") is not None:
        refuse("sliding_window", raw["sliding_window"], "null")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw.get("num_attention_heads", 0) != raw.get("hidden_size"):
        refuse("head_dim", head_dim, "hidden_size / num_attention_heads")
    kind = _rope(raw).get("rope_type", _rope(raw).get("type", "default"))
    if kind != "default":
        refuse("rope_parameters.rope_type", kind, "default")


def _refuse_wrong_types(raw: Mapping[str, Any], path: Path) -> None:
    """A file from a stranger may hold anything."""
    for name in _WHOLE_NUMBERS:
        value = raw.get(name)
        if value is not None and not (type(value) is int and 0 < value < _MOST):
            raise ConfigError(f"{path}: {name} is {value!r}, which is no size of a model")
    for name in ("rms_norm_eps", "rope_theta"):
        if type(raw.get(name, 1.0)) not in (int, float):
            raise ConfigError(f"{path}: {name} is {raw[name]!r}, not a number")
    if type(_rope(raw).get("rope_theta", 1.0)) not in (int, float):
        raise ConfigError(f"{path}: rope_parameters.rope_theta is {_rope(raw)['rope_theta']!r}, not a number")
    if type(raw.get("tie_word_embeddings", False)) is not bool:
        raise ConfigError(f"{path}: tie_word_embeddings is {raw['tie_word_embeddings']!r}, not true or false")
    for name in _TOKEN_IDS:
        if type(_first(raw.get(name))) not in (int, type(None)):
            raise ConfigError(f"{path}: {name} is {raw[name]!r}, not a token id")


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return rope if isinstance(rope, Mapping) else {"rope_type": rope}


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list) and value else value


def read_hf_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight in `folder`, one file or sharded, one tensor in memory at a time."""
    index = folder / INDEX_FILE
    names = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).is_file() and index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"{path} is missing: {folder} must hold {WEIGHTS_FILE}, or shards and {INDEX_FILE}")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def locate_weights(path: Path) -> Path:
    """The folder with weights that `path` means: itself, or the best, latest or newest checkpoint of a run folder.

    Raises CheckpointError where there is none, or where a checkpoint's model is not as it was written.
    """
    folder = path if (path / CONFIG_FILE).is_file() else _newest_inside(path)
    if (folder / MANIFEST).is_file() and (folder / "trainer_state.json").is_file():  # a checkpoint of ours
        verify(folder, only=(CONFIG_FILE, WEIGHTS_FILE))
    return folder


def _newest_inside(path: Path) -> Path:
    folders = list(model_folders(path))
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            return folder.resolve()
    described_by_code = next(filter(_is_checkpoint, folders), None)
    if described_by_code is not None:
        raise ConfigError(
            f"{described_by_code} is a checkpoint of a model of your own (model.name), without {CONFIG_FILE}: only "
            "training can go on from it; generate, evaluate and model.init_from open DecoderLM, and other models in Hugging "
            "Face's Llama format"
        )
    raise CheckpointError(f"{path} is neither a run folder with checkpoints, nor a checkpoint, nor a Hugging Face model folder")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / WEIGHTS_FILE).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    """As `read_json`, also through a link: the Hub's cache is made of them."""
    return read_json(path.resolve())
