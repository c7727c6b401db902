"""The command itself: a run by one process (forked; test_readme_commands.py has real ones) and by torchrun, its folder, and
what others can do with it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_trainer import DecoderLM, __version__, load_config, load_tokenizer
from tests.end_to_end.commands import ROOT, SMALL, lines, status, torchrun
from tests.end_to_end.forked_commands import quick_command


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of configs/debug.yaml by one process, and what it printed."""
    output = tmp_path_factory.mktemp("runs")
    done = quick_command(*SMALL, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    return output / "debug", done


def test_a_run_learns_and_leaves_a_complete_folder(finished):
    folder, done = finished
    train, validation = lines(folder), lines(folder, "validation")
    assert [line["step"] for line in train] == list(range(1, 21))
    assert train[-1]["loss"] < train[0]["loss"] - 1
    assert [line["step"] for line in validation] == [10, 20]
    needed = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "time"}
    assert all(needed <= line.keys() for line in train)
    assert validation[-1]["perplexity"] == pytest.approx(torch.tensor(validation[-1]["loss"]).exp().item(), rel=1e-4)
    assert status(folder)["state"] == "finished"
    assert status(folder)["exit_code"] == 0
    assert status(folder)["checkpoint_seconds"] > 0
    assert load_config(["--config", str(folder / "config.yaml")]).run_name == "debug"
    assert (folder / "report.html").is_file()
    assert "step 20" in (folder / "logs" / "rank-0.log").read_text()
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob(".staging-*"))


def test_the_checkpoint_loads_in_transformers_unchanged_with_the_same_logits(finished):
    folder, _ = finished
    best = folder / "checkpoints" / "best"
    tokenizer = AutoTokenizer.from_pretrained(best)
    tokens = torch.tensor([tokenizer("It is a truth universally acknowledged")["input_ids"]])
    theirs = AutoModelForCausalLM.from_pretrained(best)(tokens).logits
    ours = DecoderLM.from_pretrained(folder)(tokens)
    assert (ours - theirs).abs().max() < 1e-5
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_generate_and_evaluate_work_on_the_run(finished):
    folder, _ = finished
    said = quick_command(folder, "--prompt", "Emma was", "--max_new_tokens", "12", module="dist_trainer.generate")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("Emma was")
    assert len(said.stdout) > len("Emma was\n")
    found = quick_command(folder, module="dist_trainer.evaluate")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["loss"] == lines(folder, "validation")[-1]["loss"]


def test_two_ranks_by_torchrun_have_the_same_curve(finished, tmp_path):
    folder, _ = finished
    done = torchrun(2, *SMALL, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    ours = [line["loss"] for line in lines(tmp_path / "debug")]
    assert ours == pytest.approx([line["loss"] for line in lines(folder)], abs=5e-5)
    assert done.stderr.count("validation loss") == finished[1].stderr.count("validation loss")
    assert not re.search("warn", done.stderr.replace("FutureWarning", ""), re.IGNORECASE), done.stderr


def test_a_changed_config_is_rejected_by_naming_the_keys_and_never_starts_over(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    again = [*SMALL, "--output_dir", folder.parent]
    refused = quick_command(*again, "--optim.learning_rate", "0.5", "--seed", "9")
    assert refused.returncode == 2
    assert "optim.learning_rate: 0.5, but the run started with 0.01" in refused.stderr
    assert "seed: 9, but the run started with 0" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    said = quick_command(*again)
    assert said.returncode == 0
    assert "has already finished its 20 steps" in said.stderr


WRONG = {
    "unknown key": (["--model.hiden_size", "3"], "did you mean model.hidden_size?"),
    "wrong type": (["--seed", "x"], "seed: 'x' is not a whole number"),
    "missing data": (["--data.dataset", "./nowhere.txt"], "nowhere.txt does not exist"),
    "missing tokenizer": (["--data.tokenizer", "./nowhere"], "data.tokenizer: nowhere does not exist"),
    "Hub unreachable": (["--data.dataset", "squad"], "neither on disk in the Hub cache nor reachable on the Hub"),
    "too little data": (
        ["--data.dataset", "tests/conftest.py", "--batch.global_batch_size", "128"],
        "fewer than one global batch",
    ),
    "no such column": (["--data.text_column", "body"], "there is no column 'body'"),
    "output not writable": (["--output_dir", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    "no such file": (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    "init_from nowhere": (["--model.init_from", "./nowhere"], "model.init_from: nowhere is not a folder"),
    "no such row": (["--optim.name", "adam"], "did you mean 'adamw'?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_end_in_one_sentence_and_exit_code_2(case, tmp_path):
    words, sentence = WRONG[case]
    done = quick_command(*SMALL, "--output_dir", tmp_path, *words)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "a refused run left something behind"


@pytest.mark.slow  # without torchrun: tests/distributed/test_agreement.py
def test_under_torchrun_a_wrong_use_is_reported_once(tmp_path):
    done = torchrun(2, *SMALL, "--output_dir", tmp_path, "--data.dataset", "./nowhere.txt")
    assert done.returncode != 0
    assert done.stderr.count("nowhere.txt does not exist") == 1


@pytest.mark.parametrize("words", [["--help"], ["--print_config"]])
def test_help_and_print_config_answer_without_torch(words):
    code = f"import sys, dist_trainer.train as t\ntry: t.main({words!r})\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "learning_rate" in done.stdout


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "report"])
def test_each_command_prints_its_version_without_torch(command):
    code = f"import sys, dist_trainer.{command} as c\ntry: c.main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dist_trainer {__version__}\n", "")
