"""Tokenizers by name or path, and their identity."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import DataConfig
from dist_trainer.data.datasets import CORPUS
from dist_trainer.errors import DataError
from dist_trainer.huggingface.hub import is_hub_name
from dist_trainer.huggingface.model_files import TOKENIZER_FILE, find_tokenizer
from dist_trainer.huggingface.tokenizer_files import tokenizer_from_folder, tokenizer_from_hub

log = logging.getLogger(__name__)

Tokenizer = Any
"""A transformers.PreTrainedTokenizerBase; not imported for the name alone."""

TOKENIZER_KEY = "data.tokenizer"
END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "[EOS]")


def load_tokenizer(name: str, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """The tokenizer `austen` (inside the package), in a folder (a run's, a checkpoint's, any), or of a Hub name.

    It has an EOS token (a separator's, if need be) and a padding token. Raises DataError naming the `key` (or argument of a
    command) that holds the name, and the remedy.
    """
    path = CORPUS / "tokenizer" if name == "austen" else user_path(name)
    if path.is_file() and path.name == TOKENIZER_FILE:
        path = path.parent
    if not path.exists() and is_hub_name(name):
        tokenizer = tokenizer_from_hub(name, key)
    elif (folder := find_tokenizer(path)) is not None:
        tokenizer = tokenizer_from_folder(folder, key)
    else:
        state = "has no tokenizer in it" if path.exists() else "does not exist"
        others = ", a Hub name, or austen" if key == TOKENIZER_KEY else ""  # which are no models
        raise DataError(f"{key}: {path} {state}; give a folder with {TOKENIZER_FILE}{others}")
    return _with_end_and_padding(tokenizer, name)


def configured_tokenizer(config: DataConfig, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """That of data.tokenizer, with the template of data.chat_template where one is named, so that it is saved with it.

    Raises DataError; it calls the tokenizer's name `key`.
    """
    tokenizer = load_tokenizer(config.tokenizer, key=key)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return tokenizer


def read_chat_template(name: str) -> str:
    """The Jinja template in the file `name`. Raises DataError where there is none."""
    path = user_path(name)
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.chat_template: {path} cannot be read ({reason}); give a file that holds a Jinja template"
        ) from error
    if not template.strip():
        raise DataError(f"data.chat_template: {path} is empty; give a file that holds a Jinja template")
    return template


def _with_end_and_padding(tokenizer: Tokenizer, name: str) -> Tokenizer:
    templates = getattr(tokenizer, "chat_template", None)
    # Saved with each checkpoint, under their names.
    if isinstance(templates, dict) and not all(re.fullmatch(r"\w[\w.-]*", str(template)) for template in templates):
        raise DataError(f"data.tokenizer: {name} has a chat template whose name is no file's: {sorted(map(str, templates))}")
    if tokenizer.eos_token_id is None:
        known = tokenizer.get_added_vocab()
        end = tokenizer.sep_token or next((token for token in END_NAMES if token in known), None)
        if end is None:
            raise DataError(
                f"data.tokenizer: {name} has no end-of-text token, which documents are joined with; "
                'set "eos_token" in its tokenizer_config.json'
            )
        log.info("data.tokenizer: %s names no EOS token; documents end with %s", name, end)
        tokenizer.eos_token = end
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_description(tokenizer: Tokenizer) -> str:
    """The JSON of all that decides which ids a text gets. Not of truncation and padding, which each call sets anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def text_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that `tokenizer` puts before every text, such as BOS (Llama, Gemma, Mistral); empty where it puts none."""
    bare, whole = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    starts = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    return whole[: next(starts, 0)]


def with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """`ids` after `prefix`, which is not put twice where the text itself spells it."""
    return list(ids) if list(ids[: len(prefix)]) == list(prefix) else [*prefix, *ids]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue, as training saw texts begin: with the tokenizer's prefix. Of an empty one without a prefix the
    EOS, which ends the text before.
    """
    ids = with_prefix(tokenizer.encode(text, add_special_tokens=False), text_prefix(tokenizer))
    return ids or [tokenizer.eos_token_id]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A digest of `tokenizer_description`, of the id that ends documents, and of those that begin them, if any do."""
    parts = [tokenizer_description(tokenizer), tokenizer.eos_token_id, *text_prefix(tokenizer)]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
