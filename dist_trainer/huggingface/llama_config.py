"""config.json of Hugging Face's LlamaForCausalLM: read, checked field by field, and written. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import ConfigError
from dist_trainer.huggingface.model_files import CONFIG_FILE, GENERATION_FILE, TOKEN_IDS, check_model_folder, read_description
from dist_trainer.storage.manifest import read_json

REPRESENTED_TYPES = ("llama", "mistral")
TokenIds = int | list[int] | None
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
)
_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The fields of each rope_type."""
_MAX_SIZE = 1 << 31
_MAX_NUMBER = 1e30


@dataclass(frozen=True)
class HFModel:
    """A model as its config.json describes it."""

    config: ModelConfig
    vocabulary_size: int
    max_position_embeddings: int
    token_ids: Mapping[str, TokenIds]
    """The EOS tokens are those of generation_config.json and config.json."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The contents of generation_config.json; empty if there is none."""


def merge_token_ids(*places: TokenIds) -> TokenIds:
    """All token ids of several places, each once: a list if there are several."""
    lists = [place if isinstance(place, list | tuple) else [place] for place in places]
    ids = list(dict.fromkeys(token for place in lists for token in place if token is not None))
    return ids if len(ids) > 1 else next(iter(ids), None)


def token_id_set(ids: TokenIds) -> set[int]:
    """`ids`, one, several or none, as a set."""
    return set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}


def add_eos_token(ends: TokenIds, trained: int | None) -> TokenIds:
    """`ends` with the token that a run's texts end with added in front, unless it is already one of them."""
    return ends if trained in token_id_set(ends) else merge_token_ids(trained, ends)


def hf_config(model: HFModel) -> dict[str, Any]:
    """The contents of config.json, for transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    config = model.config
    scaling = _scaling(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {**scaling, "rope_theta": config.rope_theta},
        **({} if config.rope_type == "default" else {"rope_scaling": scaling}),
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        **model.token_ids,
    }


def _scaling(config: ModelConfig) -> dict[str, Any]:
    values = {name: getattr(config, f"rope_{name}") for name in _SCALINGS[config.rope_type]}
    return {"rope_type": config.rope_type, **values}


def read_hf_config(folder: Path) -> HFModel:
    """The model that `folder`/config.json describes.

    Raises ConfigError that names a field which DecoderLM cannot represent, and CheckpointError as `check_model_folder` does.
    """
    check_model_folder(folder)
    path = folder / CONFIG_FILE
    raw = read_json(path.resolve())  # in the Hub's cache it is a link
    _check_representable(raw, path)
    _check_types(raw, path)
    generation = read_description(folder / GENERATION_FILE)
    try:
        size, heads = raw["hidden_size"], raw["num_attention_heads"]
        head_dim = raw.get("head_dim")
        config = ModelConfig(
            hidden_size=size,
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=None if head_dim is None or head_dim * heads == size else head_dim,
            attention_bias=_is_set_for_llama(raw, "attention_bias"),
            mlp_bias=_is_set_for_llama(raw, "mlp_bias"),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10000.0),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            **_read_scaling(raw, path),
        )
        token_ids = {key: raw.get(key) for key in TOKEN_IDS}
        token_ids["eos_token_id"] = merge_token_ids(generation.get("eos_token_id"), raw.get("eos_token_id"))
        return HFModel(config, raw["vocab_size"], raw.get("max_position_embeddings", 2048), token_ids, generation)
    except KeyError as error:
        raise ConfigError(f"{path}: the field {error} is missing") from error


def _is_set_for_llama(raw: Mapping[str, Any], field: str) -> bool:
    """Mistral has no biases, whatever its config.json says."""
    return raw["model_type"] == "llama" and bool(raw.get(field))


def _check_representable(raw: Mapping[str, Any], path: Path) -> None:
    def refuse(field: str, value: object, can: str) -> NoReturn:
        raise ConfigError(
            f"{path}: {field} is {value!r}; DecoderLM can represent {can} only "
            "(--model.name hf trains other models, by transformers' code)"
        )

    kind = raw.get("model_type")
    if kind not in REPRESENTED_TYPES:
        refuse("model_type", kind, " and ".join(REPRESENTED_TYPES))
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", raw["hidden_act"], "silu")
    # If the field is missing, transformers uses a window of 4096 positions for Mistral.
    if kind == "mistral" and raw.get("sliding_window", 4096) is not None:
        refuse("sliding_window", raw.get("sliding_window", 4096), "null")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        refuse("layer_types", raw["layer_types"], "full_attention")
    if raw.get("quantization_config") is not None:
        refuse("quantization_config", raw["quantization_config"], "weights that are not quantised")
    rotated = _rope(raw).get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        refuse("partial_rotary_factor", rotated, "1")
    if _rope_type(raw) not in _SCALINGS:
        refuse(f"{_rope_field(raw)}.rope_type", _rope_type(raw), ", ".join(_SCALINGS))
    size, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if type(size) is int and type(heads) is int and heads > 0 and size % heads:
        refuse("hidden_size", size, f"a multiple of num_attention_heads ({heads})")


def _check_types(raw: Mapping[str, Any], path: Path) -> None:
    """Check the types of fields: the file is untrusted."""
    for name in _SIZES:
        value = raw.get(name)
        if value is not None and not (type(value) is int and 0 < value < _MAX_SIZE):
            raise ConfigError(f"{path}: {name} is {value!r:.80}, which is not a valid size")
    for name in ("rms_norm_eps", "rope_theta"):
        if not _is_number(raw.get(name, 1.0)):
            raise ConfigError(f"{path}: {name} is {raw[name]!r:.80}, not a number")
    if not _is_number(_rope(raw).get("rope_theta", 1.0)):
        raise ConfigError(f"{path}: {_rope_field(raw)}.rope_theta is {_rope(raw)['rope_theta']!r}, not a number")
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if type(raw.get(name, False)) is not bool:
            raise ConfigError(f"{path}: {name} is {raw[name]!r}, not true or false")


def _is_number(value: Any) -> bool:
    """Whether `value` is a number of reasonable size; JSON files may also contain infinite ones."""
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER


def _read_scaling(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The rope_* keys of the model section."""
    kind = cast(Literal["default", "linear", "llama3"], _rope_type(raw))
    values: dict[str, Any] = {"rope_type": kind}
    for name in _SCALINGS[kind]:
        value: Any = _rope(raw).get(name)
        if name == "original_max_position_embeddings":
            value = raw.get(name) or value or raw.get("max_position_embeddings", 2048)
        if type(value) not in (int, float) or not 0 < value < _MAX_SIZE:
            raise ConfigError(f"{path}: {_rope_field(raw)}.{name} is {value!r}; rope_type {kind} needs a number above 0")
        values[f"rope_{name}"] = int(value) if name == "original_max_position_embeddings" else float(value)
    return values


def _rope_field(raw: Mapping[str, Any]) -> str:
    """Which of its two names the field has; as in transformers, the older one takes precedence."""
    return "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = raw.get(_rope_field(raw)) or {}
    return rope if isinstance(rope, Mapping) else {"rope_type": rope}


def _rope_type(raw: Mapping[str, Any]) -> Any:
    kind = _rope(raw).get("rope_type", _rope(raw).get("type", "default"))
    return kind if isinstance(kind, str) else repr(kind)
