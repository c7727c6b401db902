"""A chat template is a program of someone else's: what takes without end is refused by name, and soon."""

from __future__ import annotations

import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from dist_trainer.config.schema import DataConfig
from dist_trainer.data import chat as template_limits
from dist_trainer.data.chat import ChatTemplate, within_limits
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.errors import DataError
from dist_trainer.run.evaluation import limit_chat_template

MESSAGES = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Emma."}]
MARKS = "{% generation %}{% endgeneration %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}{% endfor %}{% endfor %}"
TOO_MUCH = {
    "a long string": ("{{ 'x' * 10000000000 }}", "it takes more than 256 MiB of memory"),
    "a wide format": ("{{ '%9999999999d' | format(1) }}", "it takes more than 256 MiB of memory"),
    "a long list": ("{% set x = [0] * 9999999999 %}", "it takes more than 256 MiB of memory"),
    "doubling": (
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "it takes more than 256 MiB of memory",
    ),
    "loops": (LOOP, r"it takes more than 0\.2 s"),
    "a long text": ("{{ 'x' * 3000000 }}", "it writes 3,000,000 characters, more than 1,048,576"),
    "a power": ("{{ 9 ** 9 ** 9 }}", r"raises a number to a power \(\*\*\)"),
    "itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested brackets": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "refuses the messages"),
}


@pytest.fixture
def template_of(tmp_path: Path, monkeypatch):
    """A ChatTemplate of a text, with low limits."""
    monkeypatch.setattr(template_limits, "MAX_BYTES", 1 << 28)
    monkeypatch.setattr(template_limits, "MAX_CHARACTERS", 1 << 20)

    def made(text: str) -> ChatTemplate:
        path = tmp_path / "harm.jinja"
        path.write_text(text)
        return ChatTemplate(DataConfig(tokenizer="austen", chat_template=str(path)), load_tokenizer("austen"))

    return made


@pytest.mark.parametrize("marks", ["", MARKS])
@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_template_that_takes_too_much_is_rejected_by_name(template_of, case, marks, monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2 if case == "loops" else 60.0)
    text, said = TOO_MUCH[case]
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for render in (lambda t: t("chats.jsonl:1", MESSAGES), lambda t: t.prompt("--chat", MESSAGES[:1])):
        with pytest.raises(DataError, match=rf"data\.chat_template \S*harm\.jinja.*{said}"):
            render(template_of(text + marks))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL


def test_arguments_that_are_unpacked_are_no_power(template_of):
    text = "{% macro f(a) %}{{ a }}{% endmacro %}{{ f(**{'a': 'x'}) }}{{ f( ** {'a': 'y'}) }}{% raw %}2 ** 3{% endraw %}"
    assert template_of(text).prompt("--chat", MESSAGES) == "xy2 ** 3"


def test_lm_eval_renders_within_the_same_limits(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    tokenizer = load_tokenizer("austen")
    tokenizer.chat_template = LOOP
    limit_chat_template(tokenizer, "the chat template of folder")
    with pytest.raises(DataError, match=r"--apply_chat_template: the chat template of folder: it takes more than 0\.2 s"):
        tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Who?"
    tokenizer.chat_template = {"default": 5}
    with pytest.raises(DataError, match="is an int, not the text of a Jinja template"):
        limit_chat_template(tokenizer, "it")


def test_a_thread_that_cannot_be_interrupted_renders_all_the_same():
    found = []
    thread = threading.Thread(target=lambda: found.append(within_limits(lambda: "text")))
    thread.start()
    thread.join()
    assert found == ["text"]


def test_limits_cost_little():
    began = time.process_time()
    for _ in range(1000):
        within_limits(lambda: "text")
    assert time.process_time() - began < 0.5
