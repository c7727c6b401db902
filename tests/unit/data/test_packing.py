from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.build_datasets import Documents, split_by_document
from dist_trainer.data.loader import collate_pairs
from dist_trainer.data.packing import DocumentDataset, PackedDataset, PaddingCollator, TokenStream
from dist_trainer.data.token_store import TokenStore
from dist_trainer.data.tokenizers import load_tokenizer


def store(*lengths: int) -> TokenStore:
    """Documents whose tokens are 0, 1, 2, ... over the whole store."""
    offsets = np.cumsum([0, *lengths])
    return TokenStore(np.arange(offsets[-1], dtype=np.uint16), offsets, "key")


def documents(*lengths: int) -> Documents:
    offsets = np.cumsum([0, *lengths])
    return Documents(store(*lengths), np.stack([offsets[:-1], offsets[1:]], axis=1))


def spans(fraction: float, *lengths: int) -> tuple[list[list[int]], list[list[int]]]:
    train, validation = split_by_document(documents(*lengths), fraction, 8)
    return train.spans.tolist(), validation.spans.tolist()


def read_all(rows: PackedDataset):
    batch = rows.__getitems__(list(range(len(rows))))
    return batch.input_ids, batch.targets


@pytest.mark.parametrize("length", [1, 3, 8, 23, 24, 100])
def test_packing_makes_every_token_but_the_first_a_target_exactly_once(length):
    rows = PackedDataset(TokenStream(store(5, 1, 11, 7)), length, padding=0, fingerprint="")
    tokens, targets = read_all(rows)
    assert tokens.shape == targets.shape == (len(rows), length)
    assert targets[targets != IGNORED_TARGET].tolist() == list(range(1, 24))
    assert ((targets == tokens + 1) | (targets == IGNORED_TARGET)).all()


def test_only_the_last_sequence_is_padded():
    _, targets = read_all(PackedDataset(TokenStream(store(24)), 5, padding=0, fingerprint=""))
    assert (targets == IGNORED_TARGET).sum(1).tolist() == [0, 0, 0, 0, 2]


def test_a_stream_of_some_documents_reads_them_end_to_end():
    stream = TokenStream(store(4, 4, 4, 4), np.array([[0, 4], [4, 8], [12, 16]]))
    assert len(stream) == 12
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    for start in range(12):
        for length in (1, 3, 12):
            [row] = stream.gather(np.array([start]), length)
            assert row[: 12 - start].tolist() == expected[start : start + length]


def rows_by_a_plain_loop(store: TokenStore, spans: np.ndarray, length: int, indices: list[int], *, padding: int):
    """Tokens, targets and documents, token by token."""
    stream = [(int(store.tokens[place]), number) for number, (start, end) in enumerate(spans) for place in range(start, end)]
    tokens, targets, documents = [], [], []
    for index in indices:
        row = stream[index * length : (index + 1) * length + 1]
        row += [(None, len(spans))] * (length + 1 - len(row))
        tokens.append([padding if token is None else token for token, _ in row[:-1]])
        targets.append([IGNORED_TARGET if token is None else token for token, _ in row[1:]])
        documents.append([number - row[0][1] for _, number in row])
    return tokens, targets, documents


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 2, 7, 50, 400, 2000])
@pytest.mark.parametrize("left_out", [0.0, 0.2, 0.8])
def test_sequences_gathered_at_once_are_those_of_a_plain_loop(dtype, length, left_out):
    random = np.random.default_rng(7)
    offsets = np.cumsum([0, *random.integers(1, 60, 40)])
    store = TokenStore(random.integers(0, 1 << 16, offsets[-1]).astype(dtype), offsets, "key")
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)[random.random(40) >= left_out]
    rows = PackedDataset(TokenStream(store, spans), length, padding=9, fingerprint="")
    apart = PackedDataset(TokenStream(store, spans), length, padding=9, fingerprint="", document_mask=True)
    indices = [*random.integers(0, len(rows), 12).tolist(), len(rows) - 1, 0]
    tokens, targets, documents = rows_by_a_plain_loop(store, spans, length, indices, padding=9)
    batch = rows.__getitems__(indices)
    assert (batch.input_ids.tolist(), batch.targets.tolist(), batch.document_ids) == (tokens, targets, None)
    assert batch.input_ids.is_contiguous()
    assert batch.targets.is_contiguous()
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64

    batch = apart.__getitems__(indices)
    within = [
        [target if one == other else IGNORED_TARGET for target, one, other in zip(row, numbers, numbers[1:], strict=False)]
        for row, numbers in zip(targets, documents, strict=True)
    ]
    assert batch.document_ids.dtype == torch.int32
    assert batch.document_ids.tolist() == [numbers[:-1] for numbers in documents]
    assert (batch.input_ids.tolist(), batch.targets.tolist()) == (tokens, within)


@pytest.mark.parametrize("length", [3, 8, 100])
def test_masked_documents_have_the_targets_that_they_have_in_separate_sequences(length):
    documents_ = documents(5, 1, 11, 7)
    rows = PackedDataset(TokenStream(*documents_), length, padding=0, fingerprint="", document_mask=True)
    _, targets = read_all(rows)
    unpacked = DocumentDataset(*documents_, length)
    expected = [token for index in range(len(unpacked)) for token in unpacked[index][1:].tolist()]
    assert targets[targets != IGNORED_TARGET].tolist() == expected
    assert set(range(24)) - set(expected) == {0, 5, 6, 17}


def test_borders_are_where_documents_end_not_where_text_spells_the_end():
    eos = 2
    spelled = TokenStore(np.array([7, eos, 8, eos, 9, 9, eos], dtype=np.uint16), np.array([0, 4, 7]), "key")
    rows = PackedDataset(TokenStream(spelled, np.array([[0, 4], [4, 7]])), 6, padding=eos, fingerprint="", document_mask=True)
    assert rows[0].document_ids.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert rows[0].targets.tolist() == [[eos, 8, eos, IGNORED_TARGET, 9, eos]]


def test_documents_go_wherever_their_batch_goes():
    rows = PackedDataset(TokenStream(*documents(5, 11, 7)), 4, padding=0, fingerprint="", document_mask=True)
    together, alone = rows.__getitems__([2, 3]), rows[2]
    assert together.to(torch.device("meta")).document_ids.shape == (2, 4)
    assert together.shortened(1).document_ids.tolist() == together.document_ids[:, :-1].tolist()
    assert together.shortened(1).targets.tolist() == together.targets[:, :-1].tolist()
    one_by_one = [Batch(batch.input_ids[0], batch.targets[0], batch.document_ids[0]) for batch in (alone, rows[3])]
    assert collate_pairs(one_by_one).document_ids.equal(together.document_ids)
    without = [Batch(batch.input_ids, batch.targets) for batch in one_by_one]
    assert collate_pairs(without).document_ids is None
    assert without[0].to(torch.device("cpu")).document_ids is None


def test_padding_targets_does_not_change_the_tokens_of_a_single_sequence():
    rows = PackedDataset(TokenStream(store(24)), 5, padding=0, fingerprint="")
    assert rows[4].input_ids.tolist() == [[20, 21, 22, 23, 0]]
    assert rows[4].targets.tolist() == [[21, 22, 23, IGNORED_TARGET, IGNORED_TARGET]]


def test_sequences_do_not_depend_on_what_they_are_read_with():
    rows = PackedDataset(TokenStream(store(50)), 7, padding=0, fingerprint="")
    alone = torch.cat([rows[index].targets for index in (5, 0, 7, 7)])
    assert torch.equal(alone, rows.__getitems__([5, 0, 7, 7]).targets)


@pytest.mark.parametrize("document_mask", [False, True])
def test_parts_of_what_is_read_at_once_are_what_is_read_apart_and_know_their_targets(document_mask):
    rows = PackedDataset(TokenStream(*documents(5, 11, 7, 9)), 4, padding=0, fingerprint="", document_mask=document_mask)
    together = rows.__getitems__([0, 7, 2, 5, 3])
    parts = together.split(2)
    assert [len(part.input_ids) for part in parts] == [2, 2, 1]
    for part, indices in zip(parts, ([0, 7], [2, 5], [3]), strict=True):
        alone = rows.__getitems__(indices)
        assert part.input_ids.equal(alone.input_ids)
        assert part.targets.equal(alone.targets)
        assert (part.document_ids is not None) == (alone.document_ids is not None) == document_mask
        assert not document_mask or part.document_ids.equal(alone.document_ids)
        assert alone.counted_targets is None
        assert part.num_targets() == part.counted_targets == alone.num_targets()
        assert part.first_sequences(1).num_targets() == alone.first_sequences(1).num_targets(), (
            "of fewer rows it has to be counted again"
        )
        masked = replace(part, targets=torch.full_like(part.targets, IGNORED_TARGET))
        assert masked.num_targets() == 0, "and so it is of other targets"


def test_documents_are_split_alike_each_time_and_every_one_is_on_one_side():
    lengths = range(2, 42)
    train, validation = spans(0.1, *lengths)
    assert (train, validation) == spans(0.1, *lengths)
    assert len(validation) == 4
    assert sorted(train + validation) == documents(*lengths).spans.tolist()


def test_at_least_one_document_is_held_out_and_one_is_left():
    for fraction in (0.001, 0.999):
        train, validation = spans(fraction, 5, 5)
        assert len(train) == len(validation) == 1
    assert spans(0.0, 5, 5)[1] == []


def test_of_a_single_document_the_last_part_is_held_out():
    assert spans(0.1, 100) == ([[0, 90]], [[90, 100]])


def test_unpacked_each_document_has_its_sequences_and_padding_is_not_trained_on():
    tokenizer = load_tokenizer("austen")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    documents = [[11, 12, 13], [21], [31, 32, 33, 34, 35, 36, 37]]
    ids = [i for document in documents for i in [*document, tokenizer.eos_token_id]]
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)])
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    rows = DocumentDataset(TokenStore(np.array(ids, dtype=np.uint16), offsets, "key"), spans, 4)
    tokenizer.padding_side = "left"  # as some published tokenizers have it; rows are padded on the right all the same
    batch = PaddingCollator(tokenizer)([rows[index] for index in range(len(rows))])
    assert tokenizer.padding_side == "left"
    eos, none = tokenizer.eos_token_id, IGNORED_TARGET
    assert batch.targets.tolist() == [
        [12, 13, eos, none],
        [eos, none, none, none],
        [32, 33, 34, 35],
        [36, 37, eos, none],
    ]
    assert batch.input_ids[3, :3].tolist() == [35, 36, 37]


def test_padded_sequences_are_those_of_the_collator_for_lists_of_numbers():
    import transformers

    tokenizer = load_tokenizer("austen")
    rows = DocumentDataset(*documents(5, 2, 11, 7), 8)
    chosen = [rows[index] for index in (3, 0, 2, 0)]
    as_lists = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in chosen]
    padded = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)(as_lists)
    batch = PaddingCollator(tokenizer)(chosen)
    assert batch.input_ids.equal(padded["input_ids"][:, :-1])
    targets = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, IGNORED_TARGET)
    assert batch.targets.equal(targets[:, 1:])
    assert (batch.targets == IGNORED_TARGET).any()
