"""A model's folder: where it is, which files are read from it, and that these are safe to read. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_trainer.config.paths import CHECKPOINTS, STATUS_FILE, user_path
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.huggingface.hub import DESCRIPTION_PATTERNS, WEIGHTS_PATTERNS, download_model, is_hub_name, is_in_hub_cache
from dist_trainer.storage.manifest import MANIFEST, read_json, verify

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "tokenizer.model", "vocab.json", "vocab.txt")
"""A folder with any of these has a tokenizer."""
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's chat templates other than its default one."""
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt", "*.gguf", "*.safetensors")
"""Files with weights that are not read here."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def model_folder(name: str, *, weights: bool, key: str = "model.init_from") -> Path:
    """The folder that model.init_from, or RUN of a command (`key`, for messages), names: a local one, or one downloaded from
    the Hub, with or without its `weights`.

    Raises ConfigError, and CheckpointError as `check_model_folder` does.
    """
    path = user_path(name)
    if path.is_dir():
        check_model_folder(path)
        return path
    if path.exists() or not is_hub_name(name):
        raise ConfigError(
            f"{key}: {path} is not a folder; give a run, a checkpoint, a Hugging Face model folder, or a name on the Hub"
        )
    return download_model(name, weights=weights, key=key)


def model_folders(path: Path) -> Iterator[Path]:
    """Folders that may have the model that `path` means: `path` itself, then the checkpoints in it or in its `checkpoints`:
    best, latest, then the others, newest first.

    If there is no link `best`, as on file systems without links, status.json names it. Links out of `path` are not followed.
    """
    yield path
    root = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    best = root / "best" if (root / "best").exists() else root / _best_by_status(path)
    for candidate in (best, root / "latest", *sorted(root.glob("step-*"), reverse=True)):
        if candidate.resolve().is_relative_to(path.resolve()):
            yield candidate


def _best_by_status(run: Path) -> str:
    """The name of the best checkpoint in status.json of the run folder `run`; `best` if it names none."""
    try:
        step = read_json(run / STATUS_FILE).get("best_step")
    except CheckpointError:
        step = None
    return f"step-{step:08d}" if type(step) is int else "best"


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object in a file that describes a model; empty if there is no such file. Raises CheckpointError."""
    return read_json(path.resolve()) if path.is_file() else {}  # in the Hub's cache it is a link


def find_config(path: Path) -> Path | None:
    """The folder with the config.json of the model that `path` means; None if there is none."""
    return next((folder for folder in model_folders(path) if (folder / CONFIG_FILE).is_file()), None)


def find_tokenizer(path: Path) -> Path | None:
    """The folder with the tokenizer of the model that `path` means; None if there is none."""
    return next((folder for folder in model_folders(path) if any((folder / name).is_file() for name in TOKENIZER_FILES)), None)


def find_model(path: Path) -> Path:
    """The folder of the model that `path` means: a model, a checkpoint, or a run folder's best, latest or newest checkpoint.

    Raises ConfigError or CheckpointError if there is none that can be opened.
    """
    if (folder := find_config(path)) is not None:
        return folder if folder == path else folder.resolve()
    for folder in model_folders(path):
        if is_checkpoint(folder) and (folder / WEIGHTS_FILE).is_file():
            raise ConfigError(
                f"{folder} is a checkpoint of a model of your own (model.name), without {CONFIG_FILE}: only training can "
                "resume from it; generate, evaluate and model.init_from open DecoderLM and models of transformers"
            )
    check_model_folder(path)
    raise CheckpointError(f"{path} is neither a run folder with checkpoints, nor a checkpoint, nor a Hugging Face model folder")


def find_valid_model(path: Path, *, weights: bool = True) -> Path:
    """`find_model`; raises CheckpointError if it is a checkpoint whose model files have changed since they were written."""
    folder = find_model(path)
    is_ours = is_checkpoint(folder) and (folder / "trainer_state.json").is_file()
    if is_ours and not is_in_hub_cache(folder):
        verify(folder, only=(CONFIG_FILE, GENERATION_FILE, *([WEIGHTS_FILE] if weights else [])))
    return folder


def is_checkpoint(folder: Path) -> bool:
    """Whether this trainer wrote `folder`."""
    return (folder / MANIFEST).is_file()


def has_weights(folder: Path) -> bool:
    """Whether `folder` has weights. Raises ConfigError if it has them in other formats only."""
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return True
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    if others:
        raise ConfigError(
            f"{folder} has weights in {others[0]}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}: pickles and other formats are "
            "not opened; save the model once with transformers' save_pretrained"
        )
    return False


def check_links(folder: Path) -> None:
    """Raises CheckpointError if a file of a model or a tokenizer is a link out of `folder`.

    In the Hub's cache files are links to other files of the same model, which are allowed.
    """
    root = os.path.realpath(folder.absolute().parent.parent if is_in_hub_cache(folder) else folder)
    patterns = (*DESCRIPTION_PATTERNS, *WEIGHTS_PATTERNS, CHAT_TEMPLATES, f"{CHAT_TEMPLATES}/*")
    for path in (path for pattern in patterns for path in sorted(folder.glob(pattern))):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            raise CheckpointError(f"{path} is a link out of its folder, which is not followed; put the file there")


def check_model_folder(folder: Path) -> None:
    """Raises CheckpointError if reading a model from `folder`, by any library, would read files outside it, open a pickle, or
    run code that comes with it: the folder is untrusted.
    """
    check_links(folder)
    if (folder / ADAPTER_FILE).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_FILE}), which is not read; merge it into its model (peft's "
            "merge_and_unload) and save the result with save_pretrained"
        )
    for path in (folder / CONFIG_FILE, folder / GENERATION_FILE):
        raw = read_description(path)
        _check_config(raw, path)
        _check_token_ids(raw, path)
    _shards(folder)


def _check_config(raw: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for fields that make transformers read other files, fetch code, or build far too many layers."""
    if raw.get("transformers_weights") not in (None, WEIGHTS_FILE, INDEX_FILE):
        raise CheckpointError(
            f"{path}: transformers_weights is {raw['transformers_weights']!r}, but weights are read from {WEIGHTS_FILE} or "
            f"{INDEX_FILE} only; remove the field"
        )
    for name in _LAYERS:
        if type(raw.get(name)) is int and raw[name] > MAX_LAYERS:
            raise CheckpointError(f"{path}: {name} is {raw[name]!r:.80}; a model has {MAX_LAYERS:,} at most")
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
    """The safetensors files in `folder`: the shards that its index names, else the single one.

    Raises CheckpointError if one is missing, and for an index that names other files, or files elsewhere.
    """
    paths = [folder / name for name in _shards(folder) or [WEIGHTS_FILE]]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {folder} must hold {WEIGHTS_FILE}, or shards and {INDEX_FILE}")
    return paths


def _shards(folder: Path) -> list[str]:
    """The files that the index of `folder` names; empty if there is no index, or it is not used."""
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() or not index.is_file():
        return []
    shards = read_description(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} names no files: it has no weight_map")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {name!r}; weights are read from safetensors files in the same folder only")
    return names
