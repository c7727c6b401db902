import numpy as np
import pytest
import torch

from dist_trainer.data.batch import IGNORED_TARGET
from dist_trainer.data.packing import DocumentRows, PackedRows, PaddingCollator, TokenStream
from dist_trainer.data.rows import Documents, split_by_document
from dist_trainer.data.token_store import TokenStore
from dist_trainer.data.tokenization import load_tokenizer


def store(*lengths: int) -> TokenStore:
    """Documents whose tokens are 0, 1, 2, ... over the whole store."""
    offsets = np.cumsum([0, *lengths])
    return TokenStore(np.arange(offsets[-1], dtype=np.uint16), offsets, "key")


def documents(*lengths: int) -> Documents:
    offsets = np.cumsum([0, *lengths])
    return Documents(store(*lengths), np.stack([offsets[:-1], offsets[1:]], axis=1))


def spans(fraction: float, *lengths: int) -> tuple[list[list[int]], list[list[int]]]:
    train, validation = split_by_document(documents(*lengths), fraction)
    return train.spans.tolist(), validation.spans.tolist()


def read_all(rows: PackedRows):
    batch = rows.__getitems__(list(range(len(rows))))
    return batch.tokens, batch.targets


@pytest.mark.parametrize("length", [1, 3, 8, 23, 24, 100])
def test_packing_makes_every_token_but_the_first_a_target_exactly_once(length):
    rows = PackedRows(TokenStream(store(5, 1, 11, 7)), length, padding=0, fingerprint="")
    tokens, targets = read_all(rows)
    assert tokens.shape == targets.shape == (len(rows), length)
    assert targets[targets != IGNORED_TARGET].tolist() == list(range(1, 24))
    assert ((targets == tokens + 1) | (targets == IGNORED_TARGET)).all()


def test_only_the_last_row_is_padded():
    _, targets = read_all(PackedRows(TokenStream(store(24)), 5, padding=0, fingerprint=""))
    assert (targets == IGNORED_TARGET).sum(1).tolist() == [0, 0, 0, 0, 2]


def test_a_stream_of_some_documents_reads_them_end_to_end():
    stream = TokenStream(store(4, 4, 4, 4), np.array([[0, 4], [4, 8], [12, 16]]))
    assert len(stream) == 12
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    for start in range(12):
        for length in (1, 3, 12):
            [row] = stream.gather(np.array([start]), length)
            assert row[: 12 - start].tolist() == expected[start : start + length]


def test_padding_targets_leaves_the_tokens_of_a_single_row_alone():
    rows = PackedRows(TokenStream(store(24)), 5, padding=0, fingerprint="")
    assert rows[4].tokens.tolist() == [[20, 21, 22, 23, 0]]
    assert rows[4].targets.tolist() == [[21, 22, 23, IGNORED_TARGET, IGNORED_TARGET]]


def test_rows_do_not_depend_on_what_they_are_read_with():
    rows = PackedRows(TokenStream(store(50)), 7, padding=0, fingerprint="")
    alone = torch.cat([rows[index].targets for index in (5, 0, 7, 7)])
    assert torch.equal(alone, rows.__getitems__([5, 0, 7, 7]).targets)


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


def test_unpacked_each_document_has_its_rows_and_padding_carries_no_loss():
    tokenizer = load_tokenizer("austen")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    documents = [[11, 12, 13], [21], [31, 32, 33, 34, 35, 36, 37]]
    ids = [i for document in documents for i in [*document, tokenizer.eos_token_id]]
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents)])
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    rows = DocumentRows(TokenStore(np.array(ids, dtype=np.uint16), offsets, "key"), spans, 4)
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
    assert batch.tokens[3, :3].tolist() == [35, 36, 37]
