"""The generate command: what it prints is what transformers' generate makes of the same weights, piece by piece and whole."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dist_trainer import generate
from dist_trainer.data.datasets import CORPUS
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.generation import decoding
from dist_trainer.generation.decoding import DecodingOptions
from dist_trainer.generation.text import TextGenerator, TextStream
from dist_trainer.models.weights import open_model
from tests.distributed.ranks import exit_codes
from tests.distributed.small_runs import folder, run, small_config

PROMPT = "It was a truth"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with 64 positions, whose best checkpoint is not its latest."""
    data = tmp_path_factory.mktemp("text") / "text.txt"
    data.write_text("It was a truth that nobody acknowledged, until Emma came. " * 200)
    path = tmp_path_factory.mktemp("runs")
    config = small_config(data, path, train__max_steps=8, data__sequence_length=64, data__validation_fraction=0.2)
    assert run(config, 1) == [0]
    return folder(config)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> Path:
    """A Llama with a tokenizer in the way of sentencepiece: BOS before each text, bytes for what has no piece."""
    path = tmp_path_factory.mktemp("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "▁b"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=len(pieces), max_position_embeddings=96, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def said(capsys, *words) -> str:
    assert generate.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def greedily(path: Path, ids: list[int], *, max_new_tokens: int) -> list[int]:
    """What transformers' own generate adds to `ids`."""
    model = AutoModelForCausalLM.from_pretrained(path)
    row = torch.tensor([ids])
    made = model.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


def test_greedy_text_is_that_of_transformers_from_the_best_checkpoint(trained, capsys):
    best = trained / "checkpoints" / "best"
    tokenizer = AutoTokenizer.from_pretrained(best)
    ids = tokenizer(PROMPT)["input_ids"]
    expected = tokenizer.decode(ids + greedily(best, ids, max_new_tokens=30), skip_special_tokens=True)
    assert said(capsys, trained, "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "30") == expected + "\n"


def test_a_model_from_elsewhere_begins_as_its_tokenizer_does(elsewhere, capsys):
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    ids = tokenizer("a b")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    new = greedily(elsewhere, ids, max_new_tokens=40)
    whole = tokenizer.decode(ids + new, skip_special_tokens=True).rstrip("\ufffd")
    assert said(capsys, elsewhere, "--prompt", "a b", "--temperature", "0", "--max_new_tokens", "40") == whole + "\n"


class FromAList:
    """Stands in for the model's choice of tokens."""

    def __init__(self, monkeypatch, tokens: list[int]) -> None:
        monkeypatch.setattr("dist_trainer.generation.text.generate", lambda *_, **__: iter(tokens))


TEXTS = ["naïve café – 孔乙己 👩‍👩‍👧 ok", "plain words only", "   spaces   and\n\nlines\t", "日本語のテキスト。"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["trained", "elsewhere"])
def test_pieces_are_complete_characters_and_together_the_text(request, monkeypatch, kind, text):
    path = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(str(path))
    prompt = tokenizer.encode("a b", add_special_tokens=False)
    new = tokenizer.encode("a b" + text, add_special_tokens=False)[len(prompt) :]
    FromAList(monkeypatch, new)
    generator = TextGenerator(open_model(path), tokenizer, DecodingOptions(max_new_tokens=200))
    pieces = list(TextStream(generator, prompt))
    whole = tokenizer.decode(prompt + new)
    assert whole == tokenizer.decode(prompt) + "".join(pieces)
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > len(text.split())


def test_a_character_that_was_never_finished_is_not_shown(trained, monkeypatch, capsys):
    tokenizer = load_tokenizer(str(trained))
    FromAList(monkeypatch, [*tokenizer.encode(" x"), *tokenizer.encode("孔")[:-1]])
    assert said(capsys, trained, "--prompt", "a") == "a x\n"


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_a_terminal_gets_no_control_characters(trained, monkeypatch, on_a_terminal):
    class Stream(io.StringIO):
        def isatty(self):
            return on_a_terminal

    FromAList(monkeypatch, load_tokenizer(str(trained)).encode(" x\x1b[2J"))
    monkeypatch.setattr(sys, "stdout", Stream())
    generate.main([str(trained), "--prompt", "a"])
    assert ("\x1b" in sys.stdout.getvalue()) is not on_a_terminal


def test_text_appears_as_it_is_made(trained, monkeypatch):
    """Not only at the end: each piece is shown before the model chooses the token after next."""
    shown = []

    class Terminal(io.StringIO):
        def flush(self):
            shown.append(self.getvalue())

    def draw_and_note(*arguments, **options):
        shown_before.append(shown[-1])
        return draw(*arguments, **options)

    shown_before, draw = [], decoding.draw
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(decoding, "draw", draw_and_note)
    generate.main([str(trained), "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "20"])
    assert shown_before[0] == PROMPT
    assert len(set(shown_before)) > 10
    assert all(shown[-1].startswith(text) for text in shown_before)


def test_an_empty_prompt_starts_with_the_tokens_that_precede_a_text(trained, elsewhere, tmp_path, capsys):
    for path, where, first in ((trained, trained / "checkpoints" / "best", "eos"), (elsewhere, elsewhere, "bos")):
        begins_with = getattr(load_tokenizer(str(where)), f"{first}_token_id")
        options = ("--prompt", "", "--temperature", "0", "--max_new_tokens", "8")
        text = said(capsys, path, *options)
        assert len(text) > 4
        said(capsys, path, *options, "--output", tmp_path / "out.jsonl")
        assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] + "\n" == text
        tokenizer = load_tokenizer(str(path))
        greedy = DecodingOptions(max_new_tokens=8, temperature=0)
        stream = TextGenerator(open_model(path), tokenizer, greedy).stream("")
        assert "".join(stream) + "\n" == text
        assert stream.new_tokens == greedily(where, [begins_with], max_new_tokens=8)


def test_a_file_of_prompts_becomes_json_lines(trained, tmp_path, capsys):
    one = said(capsys, trained, "--prompt", PROMPT, "--max_new_tokens", "5")[len(PROMPT) : -1]
    text, lines, output = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    text.write_text(f"{PROMPT}\n\nEmma\n")
    lines.write_text(json.dumps({"id": 7, "prompt": PROMPT}) + "\n" + json.dumps("Emma\nsaid") + "\n" + '{"prompt": ""}\n')
    found = [json.loads(line) for line in said(capsys, trained, "--prompts_file", text, "--max_new_tokens", "5").splitlines()]
    assert [line["prompt"] for line in found] == [PROMPT, "Emma"]
    assert found[0] == {"prompt": PROMPT, "completion": one, "new_tokens": 5, "ended_by": "max_new_tokens"}
    assert said(capsys, trained, "--prompts_file", lines, "--max_new_tokens", "100", "--output", output) == ""
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in found] == [PROMPT, "Emma\nsaid", ""]
    assert found[0]["id"] == 7
    assert {line["ended_by"] for line in found} <= {"context", "end_token"}


def test_lines_that_hold_no_prompt_are_all_named(trained, tmp_path, capsys):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "x"}\n{"text": "x"}\n{"prompt\n')
    assert generate.main([str(trained), "--prompts_file", str(lines)]) == 2
    complaint = capsys.readouterr().err
    assert f'--prompts_file: {lines}:2: has no text under "prompt"' in complaint
    assert f"{lines}:3: not a JSON object" in complaint
    (tmp_path / "empty.txt").write_text("\n \n")
    assert generate.main([str(trained), "--prompts_file", str(tmp_path / "empty.txt")]) == 2
    assert generate.main([str(trained), "--prompts_file", str(lines), "--prompt", "x"]) == 2
    assert generate.main([str(trained), "--prompt", "x", "--output", str(tmp_path / "no" / "out")]) == 2
    assert "--output: " in capsys.readouterr().err
    assert generate.main([str(trained), "--prompts_file", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.endswith(
        f"--prompts_file: {tmp_path / 'gone'}: cannot be read (No such file or directory)\n"
    )
    lines.write_bytes("café".encode("latin-1"))
    assert generate.main([str(trained), "--prompts_file", str(lines)]) == 2
    assert f"--prompts_file: {lines}:1: not UTF-8 (byte" in capsys.readouterr().err


def test_a_file_of_prompts_is_read_as_data_sets_are(trained, tmp_path, capsys):
    as_text = "\ufeffIt was\r\n\r\nEmma\r\n".encode()
    as_csv = b'\xef\xbb\xbfid,prompt\r\n1,It was\r\n2,"Emma"\r\n'
    files = {
        "a.txt": as_text,
        "a.txt.gz": gzip.compress(as_text),
        "a.JSONL": b'\xef\xbb\xbf{"prompt": "It was"}\r\n{"prompt": "Emma"}\r\n',
        "a.json": b'[{"prompt": "It was"},\n "Emma"]',
        "a.csv": as_csv,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pyarrow.parquet.write_table(pa.table({"prompt": ["It was", "Emma"]}), tmp_path / "a.parquet")
    for name in (*files, "a.parquet"):
        printed = said(capsys, trained, "--prompts_file", tmp_path / name, "--max_new_tokens", "1")
        assert [json.loads(line)["prompt"] for line in printed.splitlines()] == ["It was", "Emma"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\\ud83d"}\n', ":2: half of a character (a lone surrogate"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "x", "id": "\\ud83d"}\n', ":2: half of a character (a lone surrogate"),
        ("a.txt", b"x\nx\n\xff\n", ":3: not UTF-8 text (byte 0xff)"),
        ("a.csv", b"prompt\nx\nx,y\n", ":3: 2 values, but line 1 names 1 column"),
        ("a.json", b'["x", 1]', " element 2: a JSON int, not an object"),
        ("a.pdf", b"x", ": files of type .pdf are not read"),
    ],
)
def test_nothing_is_printed_before_all_prompts_are_known_to_be_good(trained, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert generate.main([str(trained), "--prompts_file", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"--prompts_file: {tmp_path / name}{message}" in printed.err


def test_lines_from_a_pipe_are_prompts(trained, capsys, monkeypatch, tmp_path):
    words = (trained, "--max_new_tokens", "4", "--temperature", "0")
    monkeypatch.setattr("sys.stdin", io.StringIO("It was\n \nEmma\n"))
    printed = said(capsys, *words)
    assert printed == said(capsys, *words, "--prompt", "It was") + said(capsys, *words, "--prompt", "Emma")
    monkeypatch.setattr("sys.stdin", io.StringIO("It was\n"))
    assert said(capsys, *words, "--output", tmp_path / "out.jsonl") == ""
    assert json.loads((tmp_path / "out.jsonl").read_text())["prompt"] == "It was"


def test_text_that_is_not_utf8_is_rejected_wherever_it_comes_from(trained, chatty, capsys, monkeypatch):
    assert generate.main([str(trained), "--prompt", "It was\udcff"]) == 2
    assert "--prompt: is not UTF-8 text (at place 6: '\\udcff')" in capsys.readouterr().err
    assert generate.main([str(chatty), "--chat", "--system", "\udcff", "--prompt", "Hi"]) == 2
    assert "--system: is not UTF-8 text" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffIt was\r\n\udcff\n"))
    assert generate.main([str(trained), "--max_new_tokens", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("It was")
    assert "line 2 of standard input: is not UTF-8 text" in printed.err


def test_each_token_that_ends_a_text_by_the_model_s_config_ends_it(elsewhere, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(elsewhere)
    new = greedily(elsewhere, tokenizer("a b")["input_ids"], max_new_tokens=10)
    copy = tmp_path / "model"
    shutil.copytree(elsewhere, copy)
    config = json.loads((copy / "config.json").read_text())
    third = next(token for token in new[2:] if token not in new[:2])
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": [2, third]}))
    words = (copy, "--prompt", "a b", "--temperature", "0", "--output", tmp_path / "out.jsonl")
    said(capsys, *words)
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert found["ended_by"] == "end_token"
    assert found["new_tokens"] == new.index(third)


# ---------------------------------------------------------------------------------------------------------- chats


CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A model that answers each question otherwise, whose tokenizer has a chat template."""
    path = tmp_path_factory.mktemp("chatty") / "model"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, vocab_size=4096, max_position_embeddings=64, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(path)
    shutil.copytree(CORPUS / "tokenizer", path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text(CHAT)
    return path


def answer(path: Path, *contents: str, max_new_tokens: int, system: str | None = None) -> str:
    """What transformers' template and generate make of questions and answers in turn."""
    tokenizer = load_tokenizer(str(path))
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    ids = tokenizer.apply_chat_template(opening + messages, add_generation_prompt=True, return_dict=False)
    new = greedily(path, ids, max_new_tokens=max_new_tokens)
    text = tokenizer.decode(ids + new, skip_special_tokens=True)
    return text[len(tokenizer.decode(ids, skip_special_tokens=True)) :].rstrip("\ufffd")


def test_a_prompt_of_a_chat_is_a_message_and_the_answer_alone_is_shown(chatty, tmp_path, capsys):
    expected = answer(chatty, "Who is Emma?", max_new_tokens=12)
    words = (chatty, "--chat", "--temperature", "0", "--max_new_tokens", "12")
    assert said(capsys, *words, "--prompt", "Who is Emma?") == expected + "\n"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who is Emma?\nWho is Emma?\n")
    lines = [json.loads(line) for line in said(capsys, *words, "--prompts_file", prompts).splitlines()]
    assert [(line["prompt"], line["completion"]) for line in lines] == [("Who is Emma?", expected)] * 2


def test_a_system_message_comes_before_every_conversation(chatty, capsys, monkeypatch):
    words = (chatty, "--chat", "--system", "Be brief.", "--temperature", "0", "--max_new_tokens", "6")

    def told(*contents: str) -> str:
        return answer(chatty, *contents, max_new_tokens=6, system="Be brief.")

    assert told("Who came?") != answer(chatty, "Who came?", max_new_tokens=6)
    assert said(capsys, *words, "--prompt", "Who came?") == told("Who came?") + "\n"
    typed(monkeypatch, "Who came?", "Why?")
    assert said(capsys, *words) == f"{told('Who came?')}\n{told('Who came?', told('Who came?'), 'Why?')}\n"


def test_a_system_message_is_rejected_without_a_chat(trained, capsys):
    assert generate.main([str(trained), "--system", "Be brief.", "--prompt", "Who?"]) == 2
    assert "--system: needs --chat; add it" in capsys.readouterr().err


class Typing(io.StringIO):
    """A terminal to type at."""

    def isatty(self):
        return True


def typed(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", Typing())
    waiting = iter([*lines, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(waiting))


def test_what_is_typed_becomes_one_conversation(chatty, capsys, monkeypatch):
    typed(monkeypatch, "Who came?", "Why?")
    first = answer(chatty, "Who came?", max_new_tokens=6)
    second = answer(chatty, "Who came?", first, "Why?", max_new_tokens=6)
    assert second != answer(chatty, "Why?", max_new_tokens=6)
    assert said(capsys, chatty, "--chat", "--temperature", "0", "--max_new_tokens", "6") == f"{first}\n{second}\n"


def test_lines_of_a_pipe_are_each_a_conversation_of_their_own(chatty, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who came?\nWhy?\n"))
    expected = [answer(chatty, question, max_new_tokens=6) for question in ("Who came?", "Why?")]
    printed = said(capsys, chatty, "--chat", "--temperature", "0", "--max_new_tokens", "6")
    assert printed == "".join(f"{text}\n" for text in expected)


def test_a_conversation_that_fills_the_context_starts_over_and_a_question_that_does_is_rejected(chatty, capsys, monkeypatch):
    typed(monkeypatch, "Who came to them? " * 6, "Who came to her? " * 6, "Who? " * 99)
    assert generate.main([str(chatty), "--chat", "--temperature", "0", "--max_new_tokens", "3"]) == 0
    printed, complaint = capsys.readouterr()
    assert printed == "".join(answer(chatty, f"Who came to {whom}? " * 6, max_new_tokens=3) + "\n" for whom in ("them", "her"))
    assert complaint.count("the conversation has filled the model's context of 64; starting a new one") == 2
    assert complaint.count("the model's context is 64: shorten it") == 1


def test_a_chat_without_a_template_is_rejected_before_the_model_is_read(trained, capsys, monkeypatch):
    monkeypatch.setattr("dist_trainer.models.weights.open_model", None)
    assert generate.main([str(trained), "--chat", "--prompt", "Who?"]) == 2
    assert "has no chat template; leave out --chat, or put a template" in capsys.readouterr().err


def test_a_template_that_rejects_the_messages_reports_it(chatty, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(chatty, path)
    (path / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    assert generate.main([str(path), "--chat", "--prompt", "Who?"]) == 2
    assert "--chat: the chat template of " in (complaint := capsys.readouterr().err)
    assert "refuses the messages (roles user): no system message; change the messages, or use" in complaint
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Who?\nWhy?\n")
    (path / "chat_template.jinja").write_text("{% if 'y' in messages[-1].content %}{{ raise_exception('no why') }}{% endif %}x")
    assert generate.main([str(path), "--chat", "--prompts_file", str(prompts)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"--prompts_file: {prompts}:2: --chat: the chat template of " in printed.err


def test_several_ranks_are_rejected_with_one_message(trained, capfd):
    assert exit_codes(2, lambda: generate.main([str(trained), "--prompt", PROMPT])) == [2, 2]
    printed, complaint = capfd.readouterr()
    assert (printed, complaint.count("the environment describes 2 ranks; start it without torchrun")) == ("", 1)
