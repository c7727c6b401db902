"""What is read of a model's folder, which may come from a stranger: safetensors and JSON, its own files alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_trainer.errors import CheckpointError
from dist_trainer.huggingface.hub import DESCRIPTION, WEIGHTS, is_in_hub_cache
from dist_trainer.storage.manifest import read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's chat templates apart from its default one."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_links(folder: Path) -> None:
    """Raises CheckpointError where a file that a model or a tokenizer is read from is a link out of `folder`.

    In the Hub's cache files are links to others of the same model, which are inside.
    """
    root = os.path.realpath(folder.absolute().parent.parent if is_in_hub_cache(folder) else folder)
    patterns = (*DESCRIPTION, *WEIGHTS, CHAT_TEMPLATES, f"{CHAT_TEMPLATES}/*")
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            raise CheckpointError(
                f"{folder} has {path.name} behind a link out of it, which is not followed; put the file there"
            )


def check_tokenizer_folder(folder: Path) -> None:
    """Raises CheckpointError where reading a tokenizer from `folder` would read files other than its usual ones."""
    check_links(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    raw = read_json(path.resolve()) if path.is_file() else {}
    files = raw.get("fast_tokenizer_files") or []
    is_harmless = isinstance(files, list) and all(Path(str(file)).name == file for file in files)
    for name in ("gguf_file", *([] if is_harmless else ["fast_tokenizer_files"])):
        if raw.get(name):
            raise CheckpointError(f"{path}: {name} names {raw[name]!r:.80}, which is not read; remove the field")


def check_model_folder(folder: Path) -> None:
    """Raises CheckpointError where reading a model from `folder`, by whatever library, would read files outside it, open a
    pickle, or run code of others: its files may come from a stranger.
    """
    check_links(folder)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which is not read; merge it into its model once (peft's "
            "merge_and_unload), and save that with save_pretrained"
        )
    for path in (folder / CONFIG_FILE, folder / GENERATION_FILE):
        if path.is_file():
            raw = read_json(path.resolve())  # the Hub's cache is made of links
            _check_config(raw, path)
            _check_token_ids(raw, path)
    _shards(folder)


def _check_config(raw: Mapping[str, Any], path: Path) -> None:
    """What makes transformers read weights from another file, fetch code from the Hub, or make layers without end."""
    if raw.get("transformers_weights") not in (None, WEIGHTS_FILE, INDEX_FILE):
        raise CheckpointError(
            f"{path}: transformers_weights is {raw['transformers_weights']!r}, but weights are read from {WEIGHTS_FILE} or "
            f"{INDEX_FILE} only; remove the field"
        )
    for name in _LAYERS:
        if type(raw.get(name)) is int and raw[name] > MOST_LAYERS:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r:.80}; a model has {MOST_LAYERS:,} at most")
    for config in (raw, *(part for part in raw.values() if isinstance(part, dict))):
        for name in _IMPLEMENTATIONS:
            if "/" in str(config.get(name)):
                raise CheckpointError(
                    f"{path}: {name} is {config[name]!r}, which is code on the Hub and is never run; remove the field"
                )


def _check_token_ids(raw: Mapping[str, Any], path: Path) -> None:
    for name in TOKEN_IDS:
        value = raw.get(name)
        if any(type(one) not in (int, type(None)) for one in (value if isinstance(value, list) else [value])):
            raise CheckpointError(f"{path}: {name} is {value!r:.80}, not a token id")


def weight_files(folder: Path) -> list[Path]:
    """The files of safetensors in `folder`: the shards that its index names, or else its single one.

    Raises CheckpointError where one is missing, and for an index that names other files, or files elsewhere.
    """
    paths = [folder / name for name in _shards(folder) or [WEIGHTS_FILE]]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {folder} must hold {WEIGHTS_FILE}, or shards and {INDEX_FILE}")
    return paths


def _shards(folder: Path) -> list[str]:
    """Names of the files that the index of `folder` names; empty where the index is not used."""
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return []
    shards = read_json(index.resolve()).get("weight_map")  # the Hub's cache is made of links
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} names no files: it has no weight_map")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; weights are read from safetensors files in the same folder only")
    return names
