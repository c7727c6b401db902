"""Every command in the README runs: as it stands, on a tiny model, or, where it needs more, it says so."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.forked_commands import quick_command

REPOSITORY = Path(__file__).parents[2]
NEEDS = {"needs GPUs", "needs SLURM", "needs a network"}
SMALL = shlex.split(
    "--model.hidden_size 16 --model.intermediate_size 32 --model.num_hidden_layers 1 --model.num_attention_heads 2 "
    "--model.num_key_value_heads 1 --data.tokenizer austen --data.sequence_length 16 --batch.global_batch_size 2 "
    "--batch.micro_batch_size 2 --train.max_steps 2 --validation.max_batches 1 --tracking.sample_tokens 4 "
    "--tracking.wandb disabled --precision.compile false"
)


def readme_commands() -> list[tuple[str, str]]:
    """(command, remark) for each line of the README's ```bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [(command.strip(), remark.strip()) for command, _, remark in (line.partition(" #") for line in lines)]


COMMANDS = readme_commands()
RUNNABLE = [command for command, remark in COMMANDS if remark not in NEEDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's reader stands: texts of their own, and the run that `make train` left."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "my_texts").mkdir()
    for number in range(8):
        (folder / "my_texts" / f"{number}.txt").write_text(f"Letter {number}. " + "All is well here. " * 40)
    run(cheap("make train", folder))
    return folder


def cheap(command: str, folder: Path) -> list[str]:
    """The command as a test can afford it: a tiny model, and files in `folder`."""
    words = shlex.split(command)
    here = [str(folder / word) if word.startswith(("runs/", "my_texts")) else word for word in words]
    small = [*SMALL, "--output_dir", str(folder / "runs")]
    match words:
        case ["make", "test"]:
            return ["make", "--dry-run", "test"]
        case ["make", "train"]:
            return [str(REPOSITORY / "launch/local.sh"), *small]
        case ["launch/local.sh", *_]:
            data = ["--data.dataset", "austen", "--data.dataset_config", "null"]  # the preset's is on the Hub
            return [*here, *small, *data, "--run_name", "launched"]
        case ["python", "-m", "dist_trainer.train", *_]:
            return [*here, *small]
        case ["python", "-m", "dist_trainer.evaluate" | "dist_trainer.generate" | "dist_trainer.report", *_]:
            return here
    raise AssertionError(f"how is `{command}` run cheaply? Say it here, or mark it with one of {NEEDS}")


def run(words: list[str]) -> str:
    if words[:2] == ["python", "-m"]:
        quick = quick_command(*words[3:], module=words[2])
        assert quick.returncode == 0, f"{shlex.join(words)}\n{quick.stdout}\n{quick.stderr}"
        return quick.stdout
    not_from_make = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**not_from_make, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", RUNNABLE)
def test_the_command_runs(command: str, folder: Path) -> None:
    if command != "make train":  # the fixture has run it
        run(cheap(command, folder))


def test_make_train_is_set_up_and_the_local_launch() -> None:
    printed = run(["make", "--dry-run", "train", "ARGS=--seed 1"])
    assert printed.splitlines()[-1].endswith("launch/local.sh --seed 1")


def test_the_torchrun_line_is_the_one_whose_curve_is_tested() -> None:
    """test_train.py runs it with 2 ranks; 8 need GPUs."""
    lines = [shlex.split(command) for command, _ in COMMANDS if command.startswith("torchrun")]
    assert [words[:4] for words in lines] == [["torchrun", "--nproc_per_node=8", "-m", "dist_trainer.train"]]
    assert all((REPOSITORY / words[5]).is_file() for words in lines)


def test_make_test_is_set_up_and_pytest() -> None:
    assert " -m pytest " in run(cheap("make test", REPOSITORY)).splitlines()[-1]


def test_the_documented_files_of_marked_commands_exist() -> None:
    words = {word for command, _ in COMMANDS for word in shlex.split(command)}
    named = {word for word in words if word.startswith(("configs/", "launch/", "slurm/"))}
    assert named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []
