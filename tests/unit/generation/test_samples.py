"""The prompts of text samples."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dist_trainer.config.schema import DataConfig, ModelConfig, TrackingConfig
from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.tokenizers import load_tokenizer, vocabulary_size
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.generation.samples import build_sample, configured_prompt, prompt_before_answer, start_of_text
from dist_trainer.generation.text import REPLACEMENT
from dist_trainer.models.decoder_lm import DecoderLM

ROOT = Path(__file__).resolve().parents[3]
never = bool  # what bool() gives: no signal comes
CHINESE = "孔乙己是站着喝酒而穿长衫的唯一的人。" * 4
SMALL = ModelConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("austen")


def sample(tokenizer, tokens: list[int], *, sequence_length: int, prompt: str | None = None):
    """What `build_sample` returns for a sequence of `tokens`, and the model that it is for."""
    tracking = TrackingConfig(sample_prompt=prompt, sample_tokens=4)
    model = DecoderLM(SMALL, vocabulary_size(tokenizer), sequence_length)
    model.init_weights(0)
    data = DataConfig(sequence_length=sequence_length)
    return build_sample(tracking, data, tokenizer, model, [torch.tensor(tokens)], seed=0), model


@pytest.mark.parametrize("sequence_length", [4, 8, 9, 64])
def test_text_of_several_tokens_a_character_is_cut_between_characters(tokenizer, sequence_length, caplog):
    tokens = tokenizer.encode(CHINESE, add_special_tokens=False)
    made, model = sample(tokenizer, tokens, sequence_length=sequence_length)
    if made is None:
        assert sequence_length == 4, "two tokens are no character"
        return
    shown = made(model, never)
    assert shown["prompt"]
    assert CHINESE.startswith(shown["prompt"])
    assert not shown["text"].endswith(REPLACEMENT)


def test_words_are_not_split(tokenizer):
    text = "It is a truth universally acknowledged, that a single man in possession"
    for most in range(1, 16):
        beginning = tokenizer.decode(start_of_text(tokenizer.encode(text), tokenizer, most=most))
        assert text.startswith(beginning)
        assert text[len(beginning)] in " ," or " " not in beginning


def test_an_entry_without_text_costs_the_samples_and_not_the_run(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dist_trainer"), "propagate", True)
    caplog.set_level(logging.INFO, "dist_trainer")
    made, _ = sample(tokenizer, [tokenizer.eos_token_id] * 32, sequence_length=32)
    assert made is None
    assert "no text samples" in caplog.text


def test_special_tokens_before_the_text_are_passed_over(tokenizer):
    tokens = [tokenizer.eos_token_id] * 20 + tokenizer.encode("It is a truth universally acknowledged")
    made, model = sample(tokenizer, tokens, sequence_length=32)
    assert made is not None
    assert made(model, never)["prompt"].startswith("It is a truth")


def test_if_only_answers_are_trained_on_the_prompt_before_the_first_is_answered(tokenizer):
    tokens = tokenizer.encode("Is it a truth universally acknowledged, and in want of a wife? It is.", add_special_tokens=False)
    answer = len(tokens) - 3
    targets = torch.full((1, len(tokens)), IGNORED_TARGET)
    targets[0, answer - 1 : -1] = torch.tensor(tokens[answer:])
    rows = [Batch(torch.tensor([tokens]), targets)]
    model = DecoderLM(SMALL, vocabulary_size(tokenizer), 64)
    model.init_weights(0)
    made = build_sample(TrackingConfig(sample_tokens=4), DataConfig(), tokenizer, model, rows, seed=0)
    assert made is not None
    assert made(model, never)["prompt"] == tokenizer.decode(tokens[:answer])
    assert answer > 16, "more than is shown of plain text"
    assert prompt_before_answer(rows[0], most=answer - 1) == []
    assert prompt_before_answer(Batch(rows[0].input_ids, torch.full_like(targets, IGNORED_TARGET)), most=99) == []
    assert prompt_before_answer(Batch(rows[0].input_ids, rows[0].input_ids), most=99) == []


MESSAGES = '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is [Emma]?"}]'
OF_CONVERSATIONS = DataConfig(messages_column="messages", chat_template=str(ROOT / "configs" / "plain_chat.jinja"))


def test_a_list_of_messages_is_answered_if_the_data_are_conversations(tokenizer):
    written = "### System\nBe brief.\n\n### User\nWho is [Emma]?\n\n### Assistant\n"
    assert configured_prompt(MESSAGES, OF_CONVERSATIONS, tokenizer, is_chat=True) == (
        written,
        tokenizer.encode(written, add_special_tokens=False),
    )
    found_by_its_column = replace(OF_CONVERSATIONS, messages_column=None)
    tracking = TrackingConfig(sample_prompt=MESSAGES, sample_tokens=4)
    model = DecoderLM(SMALL, vocabulary_size(tokenizer), 64)
    model.init_weights(0)
    conversations = SimpleNamespace(are_conversations=True)
    made = build_sample(tracking, found_by_its_column, tokenizer, model, conversations, seed=0)
    assert made is not None
    assert made(model, never)["prompt"] == written


@pytest.mark.parametrize(
    ("prompt", "data", "is_chat"),
    [(MESSAGES, DataConfig(), False), ("[INST] Who?", OF_CONVERSATIONS, True), ('["Who?"]', OF_CONVERSATIONS, True)],
)
def test_other_prompts_are_text(tokenizer, prompt, data, is_chat):
    assert configured_prompt(prompt, data, tokenizer, is_chat=is_chat) == (
        prompt,
        tokenizer.encode(prompt, add_special_tokens=False),
    )


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ('[{"role": "user", "content": "Hi"]', "starts like a list of messages but is not valid JSON"),
        ('[{"role": "user"}]', '"content" of message 1 .* is missing'),
        ('[{"role": "tool", "content": "Hi"}]', "refuses the messages .roles tool.: roles are system, user and assistant"),
    ],
)
def test_a_list_that_is_no_conversation_is_rejected_by_its_key(tokenizer, prompt, said):
    with pytest.raises(RefusedError, match=rf"tracking\.sample_prompt: .*{said}"):
        configured_prompt(prompt, OF_CONVERSATIONS, tokenizer, is_chat=True)


def test_a_prompt_of_the_users_own_that_does_not_fit_is_rejected(tokenizer):
    with pytest.raises(ConfigError, match=r"tracking\.sample_prompt"):
        sample(tokenizer, [1], sequence_length=8, prompt="a long prompt that fills the context of eight tokens")
