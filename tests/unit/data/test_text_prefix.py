"""What a tokenizer puts before each text (BOS) stands there in training, in prompts, samples and tasks, and never twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors

from dist_trainer.config.schema import DataConfig, PrecisionConfig, TrackingConfig
from dist_trainer.data import text_pieces
from dist_trainer.data.build_datasets import record_formatter
from dist_trainer.data.datasets import open_source
from dist_trainer.data.token_bytes import build_token_bytes
from dist_trainer.data.token_store import TokenStore, token_store
from dist_trainer.data.tokenizers import load_tokenizer, prompt_ids, text_prefix, tokenizer_digest
from dist_trainer.generation.samples import build_sample
from dist_trainer.run.evaluation import HarnessOptions, open_for_harness

TEXTS = ["It is a truth.", "A truth universally acknowledged."]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% endfor %}"
)


def beginning_with(*prefix: str, ends: bool = False):
    """The bundled tokenizer with `prefix` before each text and, if it `ends` them, an EOS behind it."""
    tokenizer = load_tokenizer("austen")
    tokenizer.add_special_tokens({"additional_special_tokens": [*prefix, "<s>"]})
    tokenizer.bos_token = prefix[0] if prefix else "<s>"
    marks = [*prefix, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*prefix, "$A", *([tokenizer.eos_token] if ends else [])]),
        special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in marks],
    )
    return tokenizer


def store_of(tokenizer, records: list[dict], tmp_path: Path, **data) -> TokenStore:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = DataConfig(dataset=str(path), **data)
    split = open_source(str(path), config).train
    return token_store(split, tokenizer, record_formatter(config, tokenizer), cache_dir=tmp_path / "cache")


def documents(store: TokenStore) -> list[list[int]]:
    return [store.tokens[start:end].tolist() for start, end in zip(store.offsets, store.offsets[1:], strict=False)]


def bare(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("prefix", [(), ("<s>",), ("[gMASK]", "<sop>")])
def test_what_the_tokenizer_puts_before_a_text_precedes_each_document_and_prompt(tmp_path, prefix, ends):
    tokenizer = beginning_with(*prefix, ends=ends)
    ids = tokenizer.convert_tokens_to_ids(list(prefix))
    assert text_prefix(tokenizer) == ids
    found = documents(store_of(tokenizer, [{"text": text} for text in TEXTS], tmp_path))
    assert found == [[*ids, *bare(tokenizer, text), tokenizer.eos_token_id] for text in TEXTS]
    for text, document in zip(TEXTS, found, strict=True):
        assert prompt_ids(tokenizer, text) == document[:-1]
    assert prompt_ids(tokenizer, "") == (ids or [tokenizer.eos_token_id])


def test_a_prefix_names_another_store_and_its_absence_none(tmp_path):
    with_bos, without = beginning_with("<s>"), beginning_with("<s>")
    assert tokenizer_digest(with_bos) == tokenizer_digest(without)
    without.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert tokenizer_digest(with_bos) != tokenizer_digest(without)


class PlainTokenizer:
    """A tokenizer in Python alone, whose description has only its vocabulary."""

    def __init__(self, *, prefix: list[int], eos: int) -> None:
        self.prefix, self.eos_token_id = prefix, eos

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 0, "</s>": 1, "a": 2}

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [*(self.prefix if add_special_tokens else []), 2]}


def test_prefix_and_eos_are_part_of_the_digest_whatever_describes_the_tokenizer():
    digests = {tokenizer_digest(PlainTokenizer(prefix=prefix, eos=eos)) for prefix in ([], [0], [0, 1]) for eos in (0, 1)}
    assert len(digests) == 6


def test_only_the_first_piece_of_a_long_document_starts_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 64)
    tokenizer = beginning_with("<s>")
    long = "It is a truth. " * 40
    [document] = documents(store_of(tokenizer, [{"text": long}], tmp_path))
    assert document == [tokenizer.bos_token_id, *bare(tokenizer, long), tokenizer.eos_token_id]


def test_a_text_that_spells_it_itself_does_not_get_it_twice(tmp_path):
    tokenizer = beginning_with("<s>")
    [document] = documents(store_of(tokenizer, [{"text": f"<s>{TEXTS[0]}"}], tmp_path))
    assert document == [tokenizer.bos_token_id, *bare(tokenizer, TEXTS[0]), tokenizer.eos_token_id]
    assert prompt_ids(tokenizer, f"<s>{TEXTS[0]}") == document[:-1]


def test_in_a_prompt_with_a_completion_it_starts_the_prompt_and_is_not_trained_on(tmp_path):
    tokenizer = beginning_with("<s>")
    records = [{"text": "It is", "answer": " a truth"}, {"text": "", "answer": "A truth"}]
    store = store_of(tokenizer, records, tmp_path, completion_template="{answer}")
    for document, record in zip(documents(store), records, strict=True):
        whole = bare(tokenizer, record["text"] + record["answer"])
        assert document == [tokenizer.bos_token_id, *whole, tokenizer.eos_token_id]
    masks = np.split(np.asarray(store.loss_mask), store.offsets[1:-1])
    answers = [[*bare(tokenizer, record["answer"]), tokenizer.eos_token_id] for record in records]
    assert [np.array(d)[mask].tolist() for d, mask in zip(documents(store), masks, strict=True)] == answers


@pytest.mark.parametrize("template", [CHAT, CHAT.removeprefix("{{ bos_token }}")])
def test_a_chat_template_alone_begins_conversations_and_one_that_leaves_it_out_is_named(
    tmp_path, template, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("dist_trainer"), "propagate", True)
    tokenizer = beginning_with("<s>")
    tokenizer.chat_template = template
    messages = [{"role": "assistant", "content": TEXTS[0]}]
    [document] = documents(store_of(tokenizer, [{"messages": messages}], tmp_path, messages_column="messages"))
    assert document == tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    has_bos = template == CHAT
    assert document.count(tokenizer.bos_token_id) == int(has_bos)
    assert ("begin the template with {{ bos_token }}" in caplog.text) is not has_bos


@pytest.mark.parametrize("prompt", [None, TEXTS[0]])
def test_samples_during_training_start_with_it(monkeypatch, prompt):
    tokenizer = beginning_with("<s>")
    row = SimpleNamespace(
        input_ids=torch.tensor([[tokenizer.bos_token_id, *bare(tokenizer, TEXTS[1] * 9)]]),
        targets=torch.ones(1, 99),
    )
    monkeypatch.setattr("dist_trainer.generation.samples.can_generate", lambda _: True)
    monkeypatch.setattr("dist_trainer.generation.samples.context_length", lambda _: 64)
    monkeypatch.setattr("dist_trainer.generation.samples.end_tokens", lambda _: set())
    prompts = []
    monkeypatch.setattr("dist_trainer.generation.samples.generate", lambda _, tokens, *__, **___: prompts.append(tokens) or [])
    tracking = TrackingConfig(sample_prompt=prompt)
    made = build_sample(tracking, DataConfig(), tokenizer, None, [row], seed=0)
    said = made(None, lambda: False)["prompt"]
    assert prompts == [[tokenizer.bos_token_id, *bare(tokenizer, said)]]
    assert said == prompt if prompt is not None else said.startswith(TEXTS[1])


@pytest.mark.parametrize("prefix", [(), ("<s>",), ("[gMASK]", "<sop>")])
@pytest.mark.parametrize("chat", [False, True])
def test_lm_eval_starts_texts_the_same_way(tmp_path, prefix, chat, monkeypatch):
    monkeypatch.setattr("dist_trainer.huggingface.transformers_models.load_model", lambda _: torch.nn.Identity())
    tokenizer = beginning_with(*prefix)
    options = HarnessOptions(tasks=(), apply_chat_template=chat)

    class Told(SimpleNamespace):
        def loglikelihood_rolling(self):
            return self.add_bos_token

    told = open_for_harness(Told, tmp_path, tokenizer, options, PrecisionConfig(dtype="fp32"))
    assert told.prefix_token_id == (text_prefix(tokenizer) or [tokenizer.eos_token_id])[-1]
    assert told.add_bos_token is (bool(prefix) and not chat)
    assert told.loglikelihood_rolling() is False  # there lm_eval puts the prefix itself
    assert told.add_bos_token is (bool(prefix) and not chat)


def test_it_has_no_bytes():
    tokenizer = beginning_with("<s>")
    assert build_token_bytes(tokenizer).sizes[text_prefix(tokenizer)].tolist() == [0]
