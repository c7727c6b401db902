"""Every command in the README runs: as it stands, on a tiny model, or, where it needs more, it says so."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT
from tests.end_to_end.documented_commands import cheap, commands_of, run, runnable, stand_in

COMMANDS = commands_of(ROOT / "README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's reader stands: texts of their own, and the run that `make train` left."""
    folder = stand_in(tmp_path_factory.mktemp("reader"))
    run(cheap("make train"), folder)
    return folder


@pytest.mark.parametrize("command", runnable(COMMANDS))
def test_the_command_runs(command: str, folder: Path) -> None:
    if command != "make train":  # the fixture has run it
        run(cheap(command), folder)


def test_make_train_is_set_up_and_the_local_launch() -> None:
    printed = run(["make", "--dry-run", "train", "ARGS=--seed 1"], ROOT)
    assert printed.splitlines()[-1].endswith("launch/local.sh --seed 1")


def test_the_torchrun_line_is_the_one_whose_curve_is_tested() -> None:
    """test_train.py runs it with 2 ranks; 8 need GPUs."""
    lines = [shlex.split(command) for command, _ in COMMANDS if command.startswith("torchrun")]
    assert [words[:4] for words in lines] == [["torchrun", "--nproc_per_node=8", "-m", "dist_trainer.train"]]
    assert all((ROOT / words[5]).is_file() for words in lines)


def test_make_test_is_set_up_and_pytest() -> None:
    printed = run(["make", "--dry-run", "test"], ROOT)
    assert " -m pytest " in printed.splitlines()[-1]


def test_the_documented_files_of_marked_commands_exist() -> None:
    words = {word for command, _ in COMMANDS for word in shlex.split(command)}
    named = {word for word in words if word.startswith(("configs/", "launch/", "slurm/"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
