"""From a file of conversations, or of questions and answers, to a model that is measured and asked."""

from __future__ import annotations

import json

from transformers import AutoTokenizer

from tests.end_to_end.commands import ROOT, SMALL, command, lines

SAYS = ["Indeed.", "By no means!", "It is a truth universally acknowledged."]


def test_a_run_on_conversations_from_a_file_to_samples_and_measures(tmp_path):
    data = tmp_path / "chats.jsonl"
    conversations = [
        [{"role": "user", "content": f"Is {number} a number?"}, {"role": "assistant", "content": SAYS[number % 3]}]
        for number in range(200)
    ]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    words = [*("--data.dataset", data), *("--data.messages_column", "messages"), "--data.document_mask", "true"]
    done = command(
        *SMALL, *words, "--data.chat_template", "configs/plain_chat.jinja", "--output_dir", tmp_path, "--run_name", "chat"
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "chat"
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < losses[0] - 1
    sample = lines(run, "sample")[-1]
    assert sample["prompt"].startswith("### User\nIs ")
    assert sample["prompt"].endswith(" a number?\n\n### Assistant\n")

    # From another folder, where the template's file is not: it was saved with the model.
    measured = command(run, module="dist_trainer.evaluate", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)
    last = lines(run, "validation")[-1]
    assert (found["loss"], found["tokens"]) == (last["loss"], last["tokens"])
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoints" / "best")
    asked = tokenizer.apply_chat_template(conversations[0][:1], add_generation_prompt=True, tokenize=False)
    assert asked == "### User\nIs 0 a number?\n\n### Assistant\n"


def test_squad_s_config_takes_loss_on_answers_alone_by_one_more_key(tmp_path):
    data = tmp_path / "squad.jsonl"
    rows = [
        {"context": f"Emma has {number} pounds.", "question": "How many?", "answers": {"text": [str(number)]}}
        for number in range(150)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *("--config", ROOT / "configs" / "squad.yaml", *SMALL, "--data.dataset", data, "--data.dataset_config", "null"),
        *("--data.tokenizer", "austen", "--output_dir", tmp_path, "--run_name", "squad", "--train.max_steps", "2"),
        *("--data.template", "{context}\nQuestion: {question}\nAnswer:"),
    ]
    done = command(*words, "--data.completion_template", " {answers[text][0]}")
    assert done.returncode == 0, done.stderr
    first = lines(tmp_path / "squad")[0]
    assert 2 * 8 <= first["tokens"] <= 5 * 8, "of each of eight rows an answer of a few tokens and its end"
