"""Tokenizers by name or path, and what identifies them."""

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
"""A transformers.PreTrainedTokenizerBase, which is not imported just for its name."""

TOKENIZER_KEY = "data.tokenizer"
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "[EOS]")


def load_tokenizer(name: str, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """The tokenizer `austen` (inside the package), of a folder (a run's, a checkpoint's, any), or of a Hub name.

    It gets an EOS token (the separator if need be) and a padding token if it has none. Raises DataError naming the `key` (or
    option of a command) that holds the name, and the remedy.
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
    return _with_eos_and_padding(tokenizer, name)


def configured_tokenizer(config: DataConfig, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """The tokenizer data.tokenizer, with the template data.chat_template if there is one, so that it is saved with it.

    Raises DataError, which names `key` for the tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer, key=key)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return tokenizer


def read_chat_template(name: str) -> str:
    """The Jinja template in the file `name`. Raises DataError if there is none."""
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


def _with_eos_and_padding(tokenizer: Tokenizer, name: str) -> Tokenizer:
    templates = getattr(tokenizer, "chat_template", None)
    # Each is saved with checkpoints in a file of its name.
    if isinstance(templates, dict) and not all(re.fullmatch(r"\w[\w.-]*", str(template)) for template in templates):
        raise DataError(f"data.tokenizer: {name} has a chat template whose name is no file name: {sorted(map(str, templates))}")
    if tokenizer.eos_token_id is None:
        known = tokenizer.get_added_vocab()
        eos = tokenizer.sep_token or next((token for token in EOS_NAMES if token in known), None)
        if eos is None:
            raise DataError(
                f"data.tokenizer: {name} has no end-of-text token to end documents with; "
                'set "eos_token" in its tokenizer_config.json'
            )
        log.info("data.tokenizer: %s names no EOS token; using %s", name, eos)
        tokenizer.eos_token = eos
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_description(tokenizer: Tokenizer) -> str:
    """JSON of everything that determines the ids of a text, except truncation and padding, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def text_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that `tokenizer` puts before every text, such as BOS (Llama, Gemma, Mistral); empty if it puts none."""
    bare, complete = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    starts = (start for start in range(len(complete) - len(bare) + 1) if complete[start : start + len(bare)] == bare)
    return complete[: next(starts, 0)]


def with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """`prefix` and `ids`; just `ids` if they begin with it already."""
    return list(ids) if list(ids[: len(prefix)]) == list(prefix) else [*prefix, *ids]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue, beginning as texts did in training: with the tokenizer's prefix. For an empty text without a
    prefix the EOS, which ends the text before.
    """
    ids = with_prefix(tokenizer.encode(text, add_special_tokens=False), text_prefix(tokenizer))
    return ids or [tokenizer.eos_token_id]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of `tokenizer_description`, the EOS, and the ids that begin texts, if any."""
    parts = [tokenizer_description(tokenizer), tokenizer.eos_token_id, *text_prefix(tokenizer)]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()
