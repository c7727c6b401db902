"""From the config's data section to rows of tokens: opened, tokenised, split by document, packed or one document a row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import DataConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.best_fit_packing import BestFitPackedDataset, TruncatedDocuments, truncate_and_filter
from dist_trainer.data.datasets import Source, open_source
from dist_trainer.data.documents import record_formatter
from dist_trainer.data.packing import DocumentDataset, PackedDataset, PaddingCollator, TokenStream, identity_collate
from dist_trainer.data.sampler import FeistelPermutation
from dist_trainer.data.split import Split
from dist_trainer.data.templates import infer_layout
from dist_trainer.data.token_store import TokenStore, store_key, token_store
from dist_trainer.data.tokenizers import Tokenizer
from dist_trainer.errors import DataError, counted
from dist_trainer.storage.cache_dir import default_cache_dir

log = logging.getLogger(__name__)

VALIDATION_KEY = "data.validation_dataset"
SPLIT_KEY = (0x5917, 0)
"""Which documents are held out does not depend on the run's seed: runs with other seeds validate on the same text."""


class TokenDataset(NamedTuple):
    """A map-style data set of rows, before any rank or order, and how rows become a batch."""

    dataset: Dataset
    collate: Callable[[Any], Batch]
    remark: str = ""
    """What the user should know of them, if anything."""


def varies_in_length(dataset: Dataset) -> bool:
    """Whether batches of these rows are as long as their longest row, not all alike."""
    return getattr(dataset, "varies_in_length", False)


def are_conversations(dataset: Dataset) -> bool:
    """Whether these rows are conversations; the config alone does not say it where they were found by their column's name."""
    return getattr(dataset, "are_conversations", False)


class Documents(NamedTuple):
    """Some documents of a token store."""

    store: TokenStore
    spans: np.ndarray
    """int64 [documents, 2], in ascending order: [start, end) positions in the store."""

    @property
    def num_tokens(self) -> int:
        """Of these documents, each with its EOS."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def build_datasets(config: DataConfig, tokenizer: Tokenizer) -> tuple[TokenDataset, TokenDataset | None]:
    """What the config names to train on, and to validate on if anything. Raises DataError, ConfigError."""
    text, layout, held_out, its_layout = _splits(config)
    train = _all_documents(text, layout, tokenizer)
    if held_out is not None:
        validation = _all_documents(held_out, its_layout, tokenizer)
    else:
        train, validation = split_by_document(train, config.validation_fraction, config.sequence_length)
    origin = "held out of them" if held_out is None else f"read from {held_out.description}"
    log.info(
        "data %s: %s to train on; %s to validate on%s",
        *(config.dataset, _in_words(train), _in_words(validation), f", {origin}" if len(validation.spans) else ""),
    )
    train_rows = _rows(train, layout, tokenizer, f"data.dataset: {config.dataset}")
    return train_rows, _validation_rows(validation, its_layout, tokenizer, VALIDATION_KEY)


def fingerprints(config: DataConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """Those that the rows of `build_datasets` will have, without tokenising anything. Raises DataError."""
    text, layout, held_out, its_layout = _splits(config)

    def fingerprint(split: Split, layout: DataConfig) -> str:
        identity = record_formatter(layout, tokenizer).identity
        return store_key(split, tokenizer, identity, _cache_dir(layout), _max_bad_records(layout))

    of_text = fingerprint(text, layout)
    of_held_out = of_text if held_out is None else fingerprint(held_out, its_layout)
    return {"data_fingerprint": of_text, "validation_fingerprint": of_held_out}


def _splits(config: DataConfig) -> tuple[Split, DataConfig, Split | None, DataConfig]:
    """What is to be trained on, what is to be validated on (None: a part of the same), and how each is read."""
    source, layout = _opened(config.dataset, config, "data.dataset")
    if config.validation_dataset is None:
        return source.train, layout, source.held_out(config.validation_split), layout
    return source.train, layout, *_other_text(config.validation_dataset, config, VALIDATION_KEY)


def build_validation_dataset(config: DataConfig, tokenizer: Tokenizer, *, key: str = VALIDATION_KEY) -> TokenDataset | None:
    """What the config names to validate on; the text to train on is not even tokenised where that is a text of its own, which
    messages call `key`.
    """
    if config.validation_dataset is not None:
        held_out, layout = _other_text(config.validation_dataset, config, key)
        documents = _all_documents(held_out, layout, tokenizer)
    else:
        source, layout = _opened(config.dataset, config, "data.dataset")
        held_out = source.held_out(config.validation_split)
        documents = _all_documents(held_out or source.train, layout, tokenizer)
        if held_out is None:
            _, documents = split_by_document(documents, config.validation_fraction, config.sequence_length)
    return _validation_rows(documents, layout, tokenizer, key)


def _validation_rows(documents: Documents, config: DataConfig, tokenizer: Tokenizer, key: str) -> TokenDataset | None:
    name = config.validation_dataset or f"the validation data of {config.dataset}"
    return _rows(documents, config, tokenizer, f"{key}: {name}") if len(documents.spans) else None


def _other_text(name: str, config: DataConfig, key: str) -> tuple[Split, DataConfig]:
    """That of a data set named for validation: the split that data.validation_split names, else its validation split, or all
    of it; and how it is read.
    """
    source, layout = _opened(name, config, key)
    return source.held_out(config.validation_split) or source.train, layout


def _opened(name: str, config: DataConfig, key: str) -> tuple[Source, DataConfig]:
    """The source that `name` means, and `config` with what well-known names of its columns add to it."""
    source = open_source(name, config, key=key)
    layout = infer_layout(config, source.train.column_names())
    if layout == config:
        return source, config
    keys = f"data.template {layout.template}" if layout.template else f"data.messages_column {layout.messages_column}"
    log.info(
        "%s: %s is read by its columns, as with %s; to read it differently, set data.template and data.completion_template",
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
    """Hold out `fraction` of the documents, at least one, the same ones each time; of a single document, its last part. Of
    documents of which only parts carry loss, those that have some within `sequence_length`: the others cannot be validated on.
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
            "data.validation_fraction: there is a single document to learn from, of which no part can be held out to validate "
            "on; give more, name data.validation_dataset, or set it to 0"
        )
    if len(spans) == 1:
        start, end = spans[0].tolist()
        border = max(start + 1, end - max(2, round(fraction * (end - start))))
        log.info("the data is a single document: its last %d tokens are held out for validation", end - border)
        return Documents(store, np.array([[start, border]])), Documents(store, np.array([[border, end]]))
    count = min(num_usable - 1, max(1, round(fraction * num_usable)))
    in_order = FeistelPermutation(len(spans), SPLIT_KEY)(np.arange(count if usable.all() else len(spans)))
    held_out = np.zeros(len(spans), dtype=bool)
    held_out[in_order[usable[in_order]][:count]] = True
    return Documents(store, spans[~held_out]), Documents(store, spans[held_out])


def _rows(documents: Documents, config: DataConfig, tokenizer: Tokenizer, name: str) -> TokenDataset:
    """`name` is what a message calls the documents, beginning with the key."""
    store, spans = documents
    if store.loss_mask is not None:
        return _whole_document_rows(documents, config, tokenizer, name)
    if not config.packing:
        return TokenDataset(DocumentDataset(store, spans, config.sequence_length), PaddingCollator(tokenizer))
    stream = TokenStream(store, spans)
    packed = PackedDataset(
        stream,
        config.sequence_length,
        padding=tokenizer.eos_token_id,
        fingerprint=store.key,
        document_mask=config.document_mask,
    )
    return TokenDataset(packed, identity_collate)


def _whole_document_rows(documents: Documents, config: DataConfig, tokenizer: Tokenizer, name: str) -> TokenDataset:
    """Raises DataError where no row would have anything to learn."""
    store, spans = documents
    found = truncate_and_filter(store, spans, config.sequence_length)
    remark = _remark(found, len(spans), config.sequence_length)
    if not len(found.spans):
        answer = (
            "a completion that has text"
            if config.messages_column is None
            else 'a message of the role "assistant" that has text and is not excluded by its flag'
        )
        length = counted(config.sequence_length, "token")
        reasons = {
            f"without {answer}": found.without_answer,
            f"with answers that begin after data.sequence_length ({length})": found.answer_cut_off,
        }
        counts = ", ".join(f"{count} {what}" for what, count in reasons.items() if count)
        raise DataError(f"{name}: no document has an answer to learn (of {len(spans)}: {counts})")
    rows = BestFitPackedDataset(
        store,
        found.spans,
        config.sequence_length,
        padding=tokenizer.pad_token_id,
        packing=config.packing,
        document_mask=config.document_mask,
        are_conversations=config.messages_column is not None,
    )
    return TokenDataset(rows, identity_collate, remark)


def _in_words(documents: Documents) -> str:
    return f"{counted(len(documents.spans), 'document')}, {counted(documents.num_tokens, 'token')}"


def _remark(found: TruncatedDocuments, documents: int, sequence_length: int) -> str:
    """What was cut or left out, in a sentence; empty where nothing was."""
    length = f"data.sequence_length ({counted(sequence_length, 'token')})"
    counts = {
        f"cut, being longer than {length}": found.cut,
        f"left out, as their answers begin after {length}": found.answer_cut_off,
        "left out, as they have no answer": found.without_answer,
    }
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    return f"of {counted(documents, 'document')} {'; '.join(parts)}" if parts else ""
