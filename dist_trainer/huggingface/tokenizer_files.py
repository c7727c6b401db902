"""Tokenizers loaded by transformers, from folders and from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_trainer.errors import CheckpointError, DataError, StoppedError, first_line
from dist_trainer.huggingface.hub import is_hub_reachable, not_loaded_message
from dist_trainer.huggingface.model_files import (
    CONFIG_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    check_links,
    read_description,
)


def tokenizer_from_folder(folder: Path, key: str) -> Any:
    """The tokenizer in `folder`. Raises DataError that names `key`, which holds the folder's name."""
    import transformers

    try:
        _check_folder(folder)
        if not (folder / TOKENIZER_CONFIG_FILE).is_file() and (folder / TOKENIZER_FILE).is_file():
            return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER_FILE))
        if _is_plain(folder):
            return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, StoppedError):
        raise
    except BaseException as error:  # the library raises many kinds, and its panics are not Exceptions; one message for all
        raise DataError(f"{key}: the tokenizer in {folder} cannot be loaded: {error}") from error


def tokenizer_from_hub(name: str, key: str) -> Any:
    """The tokenizer of the Hub model `name`, from the local cache if the Hub is unreachable. Raises DataError."""
    reachable = is_hub_reachable()
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(name, local_files_only=not reachable, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds; each ends in one message
        remedy = "give a folder with tokenizer.json, or the built-in tokenizer (--data.tokenizer austen)"
        raise DataError(f"{key}: {not_loaded_message(name, first_line(error), remedy=remedy)}") from error


def _check_folder(folder: Path) -> None:
    """Raises CheckpointError if reading a tokenizer from `folder` would read files other than its usual ones."""
    check_links(folder)
    path = folder / TOKENIZER_CONFIG_FILE
    raw = read_description(path)
    files = raw.get("fast_tokenizer_files") or []
    are_inside = isinstance(files, list) and all(Path(str(file)).name == file for file in files)
    for name in ("gguf_file", *([] if are_inside else ["fast_tokenizer_files"])):
        if raw.get(name):
            raise CheckpointError(f"{path}: {name} names {raw[name]!r:.80}, which is not read; remove the field")


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer would just build the tokenizer of tokenizer.json, as for all our checkpoints. AutoTokenizer itself
    imports the model's code to find out, which takes two seconds.
    """
    config = read_description(folder / TOKENIZER_CONFIG_FILE)
    model_type = read_description(folder / CONFIG_FILE).get("model_type")
    is_fast = config.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast") and "auto_map" not in config
    return is_fast and model_type in (None, "llama") and (folder / TOKENIZER_FILE).is_file()
