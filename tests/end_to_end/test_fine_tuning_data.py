"""What docs/fine_tuning_data.md shows, as a reader would type it: from records to a model that is measured and asked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.end_to_end.commands import ROOT, SMALL, lines
from tests.end_to_end.forked_commands import quick_command

PAGE = (ROOT / "docs" / "fine_tuning_data.md").read_text("utf-8")
SAYS = ["Indeed.", "By no means!", "It is a truth universally acknowledged."]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


CHAT, ASKING_THE_RUN, PAIRS = blocks("bash")
[SQUAD] = blocks("yaml")
[RECORD] = blocks("json")
[ASKING] = blocks("python")


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def keys_of(shown: str, data: Path) -> list[str]:
    """The keys of a command of the page, with `data` for its file of that name."""
    python, m, module, *words = shlex.split(shown)
    assert (python, m, module) == ("python", "-m", "dist_trainer.train")
    assert data.name in words
    return [str(data) if word == data.name else word for word in words]


def test_a_run_on_conversations_from_a_file_to_samples_and_measures(tmp_path, monkeypatch, capsys):
    asked = [{"role": "user", "content": f"Is {number} a number?"} for number in range(200)]
    conversations = [[question, {"role": "assistant", "content": SAYS[number % 3]}] for number, question in enumerate(asked)]
    records = [json.loads(RECORD), *({"messages": messages} for messages in conversations)]
    data = write(tmp_path / "chats.jsonl", records)
    done = quick_command(*SMALL, *keys_of(CHAT, data), "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "chat"
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < losses[0] - 1
    sample = lines(run, "sample")[-1]
    assert sample["prompt"].startswith("### User\nIs ")
    assert sample["prompt"].endswith(" a number?\n\n### Assistant\n")

    # From another folder, where the template's file is not: it was saved with the model.
    measured = quick_command(run, module="dist_trainer.evaluate", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)
    last = lines(run, "validation")[-1]
    assert (found["loss"], found["tokens"]) == (last["loss"], last["tokens"])
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints" / "best")
    prompt = tokenizer.apply_chat_template(asked[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "### User\nIs 0 a number?\n\n### Assistant\n"
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "chat").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    _, _, module, *words = shlex.split(ASKING_THE_RUN)
    answered = quick_command(*words, "--max_new_tokens", "8", module=module, cwd=tmp_path)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert "Emma?" not in answered.stdout, "the answer alone is shown"
    exec(ASKING, {})
    assert capsys.readouterr().out.strip(), "a few steps teach no sense, but some words"


def test_pairs_of_a_prompt_and_a_completion(tmp_path):
    pairs = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(150)]
    done = quick_command(
        *SMALL,
        *keys_of(PAIRS, write(tmp_path / "pairs.jsonl", pairs)),
        *("--output_dir", tmp_path, "--train.max_steps", "2", "--data.packing", "false"),
    )
    assert done.returncode == 0, done.stderr
    first = lines(tmp_path / "pairs")[0]
    assert 2 * 8 <= first["tokens"] <= 5 * 8, "of each of eight rows a completion of a few tokens and its end"


@pytest.mark.slow
def test_squad_s_config_with_loss_on_the_answers_alone(tmp_path):
    rows = [
        {"context": f"Emma has {number} pounds.", "question": "How many?", "answers": {"text": [str(number)]}}
        for number in range(150)
    ]
    data = write(tmp_path / "squad.jsonl", rows)
    (tmp_path / "answers.yaml").write_text(SQUAD)
    done = quick_command(
        *("--config", ROOT / "configs" / "squad.yaml", *SMALL, "--config", tmp_path / "answers.yaml"),
        *("--data.dataset", data, "--data.dataset_config", "null", "--data.tokenizer", "austen"),
        *("--output_dir", tmp_path, "--run_name", "squad", "--train.max_steps", "2"),
    )
    assert done.returncode == 0, done.stderr
    first = lines(tmp_path / "squad")[0]
    assert 2 * 8 <= first["tokens"] <= 5 * 8, "of each of eight rows an answer of a few tokens and its end"
