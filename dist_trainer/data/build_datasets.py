"""Builds datasets of sequences from the config's data section: open, tokenise, split by document, pack or pad."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dist_trainer.config.paths import default_cache_dir, user_path
from dist_trainer.config.schema import DataConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.chat import ChatTemplate
from dist_trainer.data.datasets import Source, open_source
from dist_trainer.data.messages import read_messages
from dist_trainer.data.packing import (
    BestFitPackedDataset,
    DocumentDataset,
    PackedDataset,
    PaddingCollator,
    TokenStream,
    TruncatedDocuments,
    identity_collate,
    truncate_and_filter,
)
from dist_trainer.data.sampler import FeistelPermutation
from dist_trainer.data.split import Split
from dist_trainer.data.templates import (
    LossMaskedText,
    RecordFormatter,
    RecordToText,
    completion_template_of,
    infer_layout,
    template_formatter,
    text_formatter,
)
from dist_trainer.data.token_store import TokenStore, store_key, token_store
from dist_trainer.data.tokenizers import Tokenizer
from dist_trainer.errors import ConfigError, DataError, counted

log = logging.getLogger(__name__)

VALIDATION_KEY = "data.validation_dataset"
SPLIT_KEY = (0x5917, 0)
"""Documents are held out independently of the run's seed: runs with different seeds validate on the same text."""


class Documents(NamedTuple):
    """Some documents of a token store."""

    store: TokenStore
    spans: np.ndarray
    """int64 [documents, 2], ascending: [start, end) positions in the store."""

    @property
    def num_tokens(self) -> int:
        """Tokens of these documents, including EOS."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


class TokenDataset(NamedTuple):
    """A map-style dataset of sequences, not yet divided among ranks, and how sequences become a batch."""

    dataset: Dataset
    collate: Callable[[Any], Batch]
    warning: str = ""
    """What was truncated or skipped, if anything."""


def build_datasets(config: DataConfig, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
    """The training dataset, and the validation dataset if there is any. Raises DataError, ConfigError."""
    split, layout, held_out, held_out_layout = _splits(config)
    train = _all_documents(split, layout, tokenizer)
    if held_out is not None:
        validation = _all_documents(held_out, held_out_layout, tokenizer)
    else:
        train, validation = split_by_document(train, config.validation_fraction, config.sequence_length)
    if len(validation.spans):
        origin = "held out from these" if held_out is None else f"from {held_out.description}"
        validating = f"validating on {_format_size(validation)}, {origin}"
    else:
        validating = "no validation data"
    log.info("data %s: training on %s; %s", config.dataset, _format_size(train), validating)
    train_dataset = _dataset(train, layout, tokenizer, f"data.dataset: {config.dataset}")
    return train_dataset, _validation_dataset(validation, held_out_layout, tokenizer, VALIDATION_KEY)


def build_validation_dataset(config: DataConfig, tokenizer: Tokenizer, *, key: str = VALIDATION_KEY) -> TokenDataset | None:
    """The validation dataset, if there is any. If it is a separate dataset, the training data are not tokenised.
    Messages name `key`.
    """
    if config.validation_dataset is not None:
        held_out, layout = _validation_split(config.validation_dataset, config, key)
        documents = _all_documents(held_out, layout, tokenizer)
    else:
        source, layout = _open(config.dataset, config, "data.dataset")
        held_out = source.held_out(config.validation_split)
        documents = _all_documents(held_out or source.train, layout, tokenizer)
        if held_out is None:
            _, documents = split_by_document(documents, config.validation_fraction, config.sequence_length)
    return _validation_dataset(documents, layout, tokenizer, key)


def fingerprints(config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """The fingerprints that the datasets of `build_datasets` will have, without tokenising anything. Raises DataError."""
    split, layout, held_out, held_out_layout = _splits(config)

    def fingerprint(split: Split, layout: DataConfig) -> str:
        identity = record_formatter(layout, tokenizer).identity
        return store_key(split, tokenizer, identity, _cache_dir(layout), _max_bad_records(layout))

    train = fingerprint(split, layout)
    validation = train if held_out is None else fingerprint(held_out, held_out_layout)
    return {"data_fingerprint": train, "validation_fingerprint": validation}


def _splits(config: DataConfig) -> tuple[Split, DataConfig, Split | None, DataConfig]:
    """The training split, the validation split (None: a part of the training split), and how each is read."""
    source, layout = _open(config.dataset, config, "data.dataset")
    if config.validation_dataset is None:
        return source.train, layout, source.held_out(config.validation_split), layout
    return source.train, layout, *_validation_split(config.validation_dataset, config, VALIDATION_KEY)


def _validation_split(name: str, config: DataConfig, key: str) -> tuple[Split, DataConfig]:
    """The split of the dataset `name` to validate on, and how it is read: data.validation_split if set, else its validation
    split, else all of it.
    """
    source, layout = _open(name, config, key)
    return source.held_out(config.validation_split) or source.train, layout


def _open(name: str, config: DataConfig, key: str) -> tuple[Source, DataConfig]:
    """The source called `name`, and `config` with the keys that well-known column names in it imply."""
    source = open_source(name, config, key=key)
    layout = infer_layout(config, source.train.column_names())
    if layout == config:
        return source, config
    keys = f"data.template {layout.template}" if layout.template else f"data.messages_column {layout.messages_column}"
    log.info(
        "%s: %s is read by its column names, as with %s; to read it differently, set data.template and "
        "data.completion_template",
        *(key, name, keys),
    )
    return open_source(name, layout, key=key), layout


def _all_documents(split: Split, config: DataConfig, tokenizer: Tokenizer) -> Documents:
    store = token_store(
        split,
        tokenizer,
        record_formatter(config, tokenizer),
        cache_dir=_cache_dir(config),
        max_bad_records=_max_bad_records(config),
    )
    return Documents(store, np.stack([store.offsets[:-1], store.offsets[1:]], axis=1))


def _max_bad_records(config: DataConfig) -> int:
    return 0 if config.bad_records == "stop" else config.bad_records


def _cache_dir(config: DataConfig) -> Path:
    return user_path(config.cache_dir) if config.cache_dir else default_cache_dir()


def split_by_document(documents: Documents, fraction: float, sequence_length: int) -> tuple[Documents, Documents]:
    """Hold out `fraction` of the documents, at least one, always the same ones; if there is only one, its last part.

    If only parts of the documents are trained on, only those with such a part within `sequence_length` are held out.
    """
    store, spans = documents
    usable = np.ones(len(spans), dtype=bool)
    if store.loss_mask is not None:
        usable = np.isin(spans[:, 0], truncate_and_filter(store, spans, sequence_length).spans[:, 0])
    num_usable = int(usable.sum())
    if fraction == 0 or num_usable == 0:
        return documents, Documents(store, spans[:0])
    if num_usable == 1 and store.loss_mask is not None:
        raise DataError(
            "data.validation_fraction: there is only one document to train on, and no part of it can be held out for "
            "validation; give more documents, name data.validation_dataset, or set the key to 0"
        )
    if len(spans) == 1:
        start, end = spans[0].tolist()
        border = max(start + 1, end - max(2, round(fraction * (end - start))))
        log.info("the data are a single document: its last %d tokens are held out for validation", end - border)
        return Documents(store, np.array([[start, border]])), Documents(store, np.array([[border, end]]))
    count = min(num_usable - 1, max(1, round(fraction * num_usable)))
    in_order = FeistelPermutation(len(spans), SPLIT_KEY)(np.arange(count if usable.all() else len(spans)))
    held_out = np.zeros(len(spans), dtype=bool)
    held_out[in_order[usable[in_order]][:count]] = True
    return Documents(store, spans[~held_out]), Documents(store, spans[held_out])


def _validation_dataset(documents: Documents, config: DataConfig, tokenizer: Tokenizer, key: str) -> TokenDataset | None:
    name = config.validation_dataset or f"the validation data of {config.dataset}"
    return _dataset(documents, config, tokenizer, f"{key}: {name}") if len(documents.spans) else None


def _dataset(documents: Documents, config: DataConfig, tokenizer: Tokenizer, name: str) -> TokenDataset:
    """Sequences of these documents; messages call them `name`."""
    store, spans = documents
    if store.loss_mask is not None:
        return _best_fit_dataset(documents, config, tokenizer, name)
    if not config.packing:
        return TokenDataset(DocumentDataset(store, spans, config.sequence_length), PaddingCollator(tokenizer))
    dataset = PackedDataset(
        TokenStream(store, spans),
        config.sequence_length,
        padding=tokenizer.eos_token_id,
        fingerprint=store.key,
        document_mask=config.document_mask,
    )
    return TokenDataset(dataset, identity_collate)


def _best_fit_dataset(documents: Documents, config: DataConfig, tokenizer: Tokenizer, name: str) -> TokenDataset:
    """Raises DataError if no document has anything to train on."""
    store, spans = documents
    kept = truncate_and_filter(store, spans, config.sequence_length)
    if not len(kept.spans):
        answer = (
            "a completion that has text"
            if config.messages_column is None
            else 'a message of the role "assistant" that has text and is not excluded by its flag'
        )
        reasons = {
            f"without {answer}": kept.without_answer,
            f"with answers that start after token {config.sequence_length} (data.sequence_length)": kept.answer_cut_off,
        }
        counts = ", ".join(f"{count} {what}" for what, count in reasons.items() if count)
        raise DataError(f"{name}: no document has an answer to train on (of {len(spans)}: {counts})")
    dataset = BestFitPackedDataset(
        store,
        kept.spans,
        config.sequence_length,
        padding=tokenizer.pad_token_id,
        packing=config.packing,
        document_mask=config.document_mask,
        are_conversations=config.messages_column is not None,
    )
    return TokenDataset(dataset, identity_collate, _format_warning(kept, len(spans), config.sequence_length))


def _format_size(documents: Documents) -> str:
    return f"{counted(len(documents.spans), 'document')} ({counted(documents.num_tokens, 'token')})"


def _format_warning(kept: TruncatedDocuments, num_documents: int, sequence_length: int) -> str:
    """What was truncated or skipped, as a sentence; empty if nothing was."""
    total = counted(num_documents, "document")
    parts = {
        f"of {total} truncated to {counted(sequence_length, 'token')} (data.sequence_length)": kept.truncated,
        f"of {total} skipped: the answer starts after token {sequence_length}": kept.answer_cut_off,
        f"of {total} skipped: no answer": kept.without_answer,
    }
    return "; ".join(f"{count} {what}" for what, count in parts.items() if count)


def record_formatter(config: DataConfig, tokenizer: Tokenizer) -> RecordFormatter:
    """The formatter that `config` describes. Raises DataError, ConfigError."""
    if config.messages_column is not None:
        return _of_conversations(config, config.messages_column, tokenizer)
    if config.chat_template is not None:
        raise ConfigError(
            f"data.chat_template: {config.chat_template!r} is set, but {config.dataset} has no column named messages or "
            "conversations; name its column by data.messages_column, or set data.chat_template to null"
        )
    text = text_formatter(config.text_column, config.template)
    if (completion_template := completion_template_of(config)) is not None:
        return _of_completions(config, completion_template, text)
    return RecordFormatter(text, json.dumps([config.text_column, config.template]))


def _of_conversations(config: DataConfig, column: str, tokenizer: Tokenizer) -> RecordFormatter:
    template = ChatTemplate(config, tokenizer)

    def make(where: str, record: dict[str, Any]) -> LossMaskedText:
        return template(where, read_messages(where, record, column))

    parts = [
        "messages, with their flags",
        column,
        template.text,
        sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()),
    ]
    return RecordFormatter(make, json.dumps(parts), has_loss_mask=True)


def _of_completions(config: DataConfig, completion_template: str, prompt: RecordToText) -> RecordFormatter:
    completion = template_formatter(completion_template, key="data.completion_template")

    def make(where: str, record: dict[str, Any]) -> LossMaskedText:
        before, after = str(prompt(where, record)), completion(where, record)
        text = before + after
        # An empty completion would train the model to answer nothing.
        return LossMaskedText(text, [(len(before), len(text))] if after.strip() else [], is_complete=False)

    parts = ["completion, not an empty one", config.text_column, config.template, completion_template]
    return RecordFormatter(make, json.dumps(parts), has_loss_mask=True)
