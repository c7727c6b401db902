"""What a token stands for in bytes: over a document they are its bytes, whatever made it tokens; or nothing is claimed."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.datasets import open_source
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.tokenizers import load_tokenizer
from tests.unit.data import test_tokenising as tokenizers_by_name
from tests.unit.data.test_tokenising import byte_level, wrapped

ODD = [
    "It's 12345!\r\n\t  two  spaces, and a tail  ",
    "Ελληνικά 中文 \U0001f469\u200d\U0001f467 naïve € \x00\x07",
    "x",
    "\n",
]


@pytest.fixture(scope="module")
def novels() -> list[str]:
    return [record["text"] for _, record in open_source("austen", DataConfig()).validation.records()]


def austen(novels):
    return load_tokenizer("austen")


def gpt2_with_a_space_before_each_text(novels):
    return wrapped(byte_level(novels, pre_tokenizers.ByteLevel(add_prefix_space=True)))


def gpt2_with_added_words(novels):
    tokenizer = tokenizers_by_name.like_gpt2(novels)
    tokenizer.add_tokens(["  ", "中文", "€"])
    return tokenizer


def llama2(novels):
    """With the decoder that Llama 2's has, too."""
    tokenizer = tokenizers_by_name.like_llama2(novels)
    spaces = decoders.Replace("▁", " ")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def mistral(novels):
    """As Llama 2's, but with a space before the whole text alone, not before each part that special tokens cut."""
    tokenizer = llama2(novels)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


def gemma(novels):
    """No space before a text."""
    tokenizer = llama2(novels)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [austen, gpt2_with_a_space_before_each_text, gpt2_with_added_words, llama2, mistral, gemma],
)
def test_the_bytes_of_a_stream_of_documents_are_those_of_their_texts(novels, kind):
    tokenizer = kind(novels)
    sizes = build_token_bytes(tokenizer)
    assert sizes is not None
    texts = [novels[0][:50_000], *ODD]
    stream = [tokenizer.eos_token_id]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        alone = Batch(torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]]), torch.tensor([ids]))
        assert sizes.count(alone) == len(text.encode()), text[:50]
        stream += [*ids, tokenizer.eos_token_id]
    rows = torch.tensor([stream])
    assert sizes.count(Batch(rows[:, :-1], rows[:, 1:])) == sum(len(text.encode()) for text in texts)


def test_a_space_that_the_tokenizer_adds_counts_only_between_words(novels):
    tokenizer = llama2(novels)
    sizes, end = build_token_bytes(tokenizer), tokenizer.eos_token_id
    (word,) = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert sizes.count(Batch(torch.tensor([[end]]), torch.tensor([[word]]))) == len("the")
    assert sizes.count(Batch(torch.tensor([[word]]), torch.tensor([[word]]))) == len(" the")


def test_only_targets_that_carry_loss_count_and_special_tokens_have_no_text(novels):
    tokenizer = load_tokenizer("austen")
    ids = tokenizer("truth universally", add_special_tokens=False)["input_ids"]
    row = torch.tensor([[*ids, tokenizer.eos_token_id, *ids]])
    targets = row[:, 1:].clone()
    counted = len("truth universally" * 2) - len(tokenizer.decode(ids[:1]))
    assert build_token_bytes(tokenizer).count(Batch(row[:, :-1], targets)) == counted
    targets[0, -1] = IGNORED_TARGET
    assert build_token_bytes(tokenizer).count(Batch(row[:, :-1], targets)) == counted - len(tokenizer.decode(ids[-1:]))


def in_lower_case(novels):
    tokenizer = tokenizers_by_name.like_gpt2(novels)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return tokenizer


def that_does_not_know_all_characters(novels):
    """As Llama 2's, without its bytes."""
    description = json.loads(llama2(novels).backend_tokenizer.to_str())
    description["model"]["byte_fallback"] = False
    return wrapped(Tokenizer.from_str(json.dumps(description)), unk_token="<unk>")


@pytest.mark.parametrize("kind", [tokenizers_by_name.of_word_pieces, in_lower_case, that_does_not_know_all_characters])
def test_if_tokens_do_not_spell_the_text_no_number_is_claimed(novels, kind):
    assert build_token_bytes(kind(novels)) is None
