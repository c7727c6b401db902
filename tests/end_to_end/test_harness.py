"""`evaluate --harness` with the real lm_eval, offline: the example of docs/evaluating.md, and its numbers beside our own."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.end_to_end.commands import ROOT, SMALL, command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra `harness`"),
]
PAGE = (ROOT / "docs" / "evaluating.md").read_text("utf-8")
TEXT = "It is a truth universally acknowledged – “naïve”, perhaps."
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader of the page stands: a run, and the files that the page shows."""
    folder = tmp_path_factory.mktemp("reader")
    trained = command(*SMALL, "--output_dir", folder / "runs", "--run_name", "default")
    assert trained.returncode == 0, trained.stderr
    (folder / "my_tasks").mkdir()
    shown = re.findall(r"`(my_tasks/\S+\.(?:jsonl|yaml))`[^`]*```(?:json|yaml)\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in shown] == ["my_tasks/letters.jsonl", "my_tasks/letters.yaml", "my_tasks/letters_text.yaml"]
    for name, text in shown:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def evaluate(folder: Path, *words: Any) -> subprocess.CompletedProcess[str]:
    return command(*words, module="dist_trainer.evaluate", cwd=folder, PYTHONPATH=str(ROOT))


def found(folder: Path, *words: Any) -> dict[str, Any]:
    done = evaluate(folder, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_example_of_the_page_runs_without_a_network_and_its_results_are_kept_with_the_run(reader):
    [line] = [line for line in PAGE.splitlines() if line.endswith("# needs lm_eval")]
    python, m, module, *words = shlex.split(line, comments=True)
    assert (python, m, module) == ("python", "-m", "dist_trainer.evaluate")
    said = found(reader, *words)
    results = said["results"]
    assert 0 <= results["letters"]["acc,none"] <= 1
    # 20 steps from nothing: better than any byte alike, worse than anyone who reads.
    assert 1 < results["letters_text"]["bits_per_byte,none"] < 8
    kept = json.loads((reader / said["file"]).read_text())
    assert Path(said["file"]).parent == Path("runs/default/evaluations")
    assert kept["results"] == results
    assert kept["n-samples"]["letters"]["effective"] == 2
    assert found(reader, *words)["results"] == results
    assert len(list((reader / "runs/default/evaluations").iterdir())) == 2


def test_lm_eval_and_evaluate_find_the_same_nats(reader):
    """Of the same tokens: those of a text that an EOS comes before, and the EOS that ends it."""
    task = (reader / "my_tasks/letters_text.yaml").read_text()
    (reader / "whole").mkdir()
    task = task.replace("letters_text", "whole").replace("my_tasks/letters", "whole/whole")
    (reader / "whole/whole.yaml").write_text(re.sub(r"doc_to_target: .*", 'doc_to_target: "{{text}}"', task))
    (reader / "whole/whole.jsonl").write_text(json.dumps({"text": TEXT + END}) + "\n")
    theirs = found(reader, "runs/default", "--harness", "whole", "--harness_tasks", "whole")["results"]["whole"]
    (reader / "text.txt").write_text(END + TEXT)
    ours = found(reader, "runs/default", "--data", "text.txt")
    assert ours["bytes"] == len(TEXT.encode())
    their_bits = theirs["bits_per_byte,none"] * len((TEXT + END).encode())
    assert ours["bits_per_byte"] * ours["bytes"] == pytest.approx(their_bits, rel=1e-6)
    assert ours["loss"] * ours["tokens"] == pytest.approx(their_bits * math.log(2), rel=1e-6)


def test_both_put_the_tokenizer_s_bos_before_a_text_once(reader):
    folder = reader / "begins"
    shutil.copytree(reader / "runs/default/checkpoints/best", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)
    before = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{before[0]} $A", special_tokens=[before])
    tokenizer.save_pretrained(folder)
    (folder / "trainer_state.json").unlink()
    task = (
        (reader / "my_tasks/letters_text.yaml")
        .read_text()
        .replace("letters_text", "begun")
        .replace("my_tasks/letters", "begun/b")
    )
    (reader / "begun").mkdir()
    (reader / "begun/begun.yaml").write_text(re.sub(r"doc_to_target: .*", 'doc_to_target: "{{text}}"', task))
    (reader / "begun/b.jsonl").write_text(json.dumps({"text": TEXT + END}) + "\n")
    theirs = found(reader, folder, "--harness", "begun", "--harness_tasks", "begun")["results"]["begun"]
    (reader / "begun.txt").write_text(TEXT)
    ours = found(reader, folder, "--data", "begun.txt", "--data.packing", "false")
    their_nats = theirs["bits_per_byte,none"] * len((TEXT + END).encode()) * math.log(2)
    assert ours["loss"] * ours["tokens"] == pytest.approx(their_nats, rel=1e-6)


def test_a_model_without_a_run_is_evaluated_and_nothing_is_written_next_to_it(reader):
    shutil.copytree(reader / "runs/default/checkpoints/best", reader / "model", symlinks=False)
    before = sorted(reader.rglob("*"))
    said = found(reader, "model", "--harness", "my_tasks/letters.yaml", "--limit", "1", "--num_fewshot", "1")
    assert said["file"] is None
    assert said["results"]["letters"]["sample_len"] == 1
    assert sorted(reader.rglob("*")) == before


def test_what_cannot_be_had_ends_in_a_sentence(reader):
    unknown = evaluate(reader, "runs/default", "--harness", "leters,arc_esy", "--harness_tasks", "my_tasks")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "unknown task 'leters'; did you mean letters" in unknown.stderr
    assert "unknown task 'arc_esy'; did you mean arc_easy" in unknown.stderr
    on_the_hub = evaluate(reader, "runs/default", "--harness", "arc_easy")
    assert (on_the_hub.returncode, on_the_hub.stdout) == (2, "")
    assert "lm_eval cannot evaluate arc_easy" in on_the_hub.stderr
    assert "The Hub cannot be reached" in on_the_hub.stderr
    (reader / "gone").mkdir()
    (reader / "gone/gone.yaml").write_text((reader / "my_tasks/letters.yaml").read_text().replace("letters", "gone"))
    gone = evaluate(reader, "runs/default", "--harness", "gone", "--harness_tasks", "gone")
    assert gone.returncode == 2
    assert "my_tasks/gone.jsonl'" in gone.stderr
    assert "Hub" not in gone.stderr
    assert "Traceback" not in unknown.stderr + on_the_hub.stderr + gone.stderr
