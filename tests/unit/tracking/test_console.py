"""What people see: a line a logged step in the log file, a bar on every terminal."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.config.command_line import command_path
from dist_trainer.config.schema import ModelConfig
from dist_trainer.huggingface.llama_config import HFModel, hf_config
from dist_trainer.models.weights import can_open
from dist_trainer.tracking.console import ConsoleTracker, next_steps
from dist_trainer.tracking.run_log import PACKAGE_LOGGER, configure_logging
from dist_trainer.tracking.status import append_event, write_status
from tests.unit.tracking.runs import train_line, validation_line


def tracker_of(folder: Path, *, start_step: int = 0, max_steps: int = 20, **more: Any) -> ConsoleTracker:
    return ConsoleTracker("default", folder, start_step=start_step, max_steps=max_steps, **more)


@pytest.fixture
def log_to():
    """Sends log messages to a folder; other tests find logging as it was."""
    logger = logging.getLogger(PACKAGE_LOGGER)
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield lambda folder: configure_logging(folder, rank=0)
    configure_logging(None, rank=0)
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


def test_every_logged_step_has_its_line_in_the_log_file_with_the_time_left(tmp_path, log_to):
    log_to(tmp_path)
    seconds = iter(float(n) for n in range(100))
    tracker = tracker_of(tmp_path, clock=lambda: next(seconds))
    for step in (1, 5, 10, 15, 20):
        tracker.log(train_line(step))
    tracker.close(state="finished", reason=None)
    lines = [line for line in (tmp_path / "rank-0.log").read_text().splitlines() if "grad norm" in line]
    assert [line.split("/20")[0].split()[-1] for line in lines] == ["1", "5", "10", "15", "20"]
    assert [" left" in line for line in lines] == [False, True, True, True, False]


@pytest.mark.parametrize("columns", [0, 60])
def test_a_bar_is_shown_on_a_terminal_whatever_width_it_reports(tmp_path, monkeypatch, columns):
    reading, writing = pty.openpty()
    if columns:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        tracker = tracker_of(tmp_path)
        tracker.log(train_line(10))
        tracker._bar.refresh()
        tracker.close(state="finished", reason=None)
        terminal.flush()
        shown = b""
        while b"10/20 [" not in shown:  # the bar's own words; a terminal hands out what it has, bit by bit
            assert select.select([reading], [], [], 10)[0], shown
            shown += os.read(reading, 65536)
    os.close(reading)


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (130, ["loss", "tokens/s", "lr", "s per step"]),
        (96, ["loss", "tokens/s", "lr"]),
        (80, ["loss", "tokens/s"]),
        (66, ["loss"]),
        (50, []),
    ],
)
def test_a_bar_shows_complete_fields_or_none_and_is_never_short(tmp_path, monkeypatch, columns, fields):
    monkeypatch.setattr("dist_trainer.tracking.console._width", lambda: {"ncols": columns, "nrows": 24})
    reading, writing = pty.openpty()
    with open(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        tracker = tracker_of(tmp_path, max_steps=10_000)
        for step in (10, 20):
            tracker.log(train_line(step, 4.25) | {"lr": 5e-4, "tokens_per_second": 7074.0})
        drawn = str(tracker._bar)
        tracker.close(state="finished", reason=None)
    os.close(reading)
    assert len(drawn) <= columns
    bar = re.search(r"\|(.*?)\|", drawn)
    assert bar is not None
    assert len(bar[1]) >= 10
    complete = {"loss": "loss 4.2500", "tokens/s": "7.07k tokens/s", "lr": "lr 5.00e-04", "s per step": "0.500 s per step"}
    assert [name for name in complete if re.search(rf"[\[ ]{complete[name]}[,\]]", drawn)] == fields
    assert drawn.count("[") == drawn.count("]")


def test_the_bar_s_time_left_follows_from_the_steps_of_this_start_after_the_first(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    reading, writing = pty.openpty()
    with open(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        tracker = tracker_of(tmp_path, start_step=10)
        now[0] += 300  # it compiles
        tracker.log(train_line(11))
        now[0] += 10
        tracker.log(train_line(12))
        bar = tracker._bar.format_dict
        tracker.close(state="preempted", reason=None)
    os.close(reading)
    assert (bar["n"], bar["total"], bar["elapsed"]) == (12, 20, 10)
    assert (bar["total"] - bar["n"]) / bar["rate"] == pytest.approx(80)


@pytest.mark.parametrize("is_on_the_path", [True, False])
def test_the_commands_at_the_end_can_be_pasted_into_the_shell_that_ran(tmp_path, monkeypatch, is_on_the_path):
    """Whether or not its environment is activated, and whatever the folder's name."""
    folder = tmp_path / "two words; echo $HOME"
    here = Path(sys.executable).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{here if is_on_the_path else tmp_path}:/usr/bin:/bin")
    first, *commands = next_steps(folder, can_open=True).splitlines()
    assert first == f"open {folder}/report.html in a browser, or run"
    words = [shlex.split(line, comments=True) for line in commands]
    python = "python" if is_on_the_path else sys.executable
    assert [[python, "-m", f"dist_trainer.{command}", str(folder)] for command in ("generate", "evaluate", "report")] == words
    found = subprocess.run(
        ["bash", "-c", f"{shlex.quote(words[0][0])} -c 'import sys; print(sys.executable)'"], capture_output=True, text=True
    )
    assert Path(found.stdout.strip()).parent == here


def test_the_python_of_an_environment_below_the_working_folder_is_named_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "wandb"):
        (programs / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert command_path(path="/usr/bin:/bin") == ".venv/bin/python"
    assert command_path("wandb", path="/usr/bin:/bin") == ".venv/bin/wandb"
    assert command_path("wandb", path=f"{programs}:/usr/bin:/bin") == "wandb"
    assert command_path("trackio", path="/usr/bin:/bin") == "trackio", "which is elsewhere, if anywhere"


def test_after_training_on_conversations_the_run_says_how_to_chat(tmp_path):
    assert f"dist_trainer.generate {tmp_path} --chat " in next_steps(tmp_path, can_open=True, chats=True)


def write_model_config(folder: Path, config: dict[str, Any]) -> None:
    checkpoint = folder / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "opens"),
    [
        (hf_config(HFModel(ModelConfig(), 4096, 64, {})), True),
        ({"model_type": "gpt2"}, True),
        ({"model_type": "my_own"}, False),
        ({"model_type": "clip_vision_model"}, False),
        (None, False),
    ],
    ids=["ours", "of transformers", "of no library", "no language model", "none"],
)
def test_no_suggested_command_would_reject_the_model(tmp_path, config, opens):
    if config is not None:
        write_model_config(tmp_path, config)
    said = next_steps(tmp_path, can_open=can_open(tmp_path))
    assert "dist_trainer.report" in said
    assert [f"dist_trainer.{command}" in said for command in ("generate", "evaluate")] == [opens, opens]


@pytest.mark.parametrize(
    ("restarts", "counts"), [(0, "no restarts"), (1, "1 restart, 3 steps lost"), (2, "2 restarts, 6 steps lost")]
)
def test_the_last_line_names_the_end_its_reason_the_best_checkpoint_and_the_cost_of_restarts(
    tmp_path, log_to, restarts, counts
):
    log_to(tmp_path)
    for start in range(restarts + 1):
        append_event(tmp_path, "start", step=0, lost_steps=3 if start else 0)
    tracker = tracker_of(tmp_path)
    tracker.log(train_line(10))
    tracker.log(validation_line(10, loss=1.5))
    # The last three steps have no line of their own.
    write_status(tmp_path, "preempted", step=13, max_steps=20, best_step=10, best_loss=1.5)
    tracker.close(state="preempted", reason="SIGINT")
    *_, line, last = (tmp_path / "rank-0.log").read_text().splitlines()
    assert "stopped at step 13 of 20 (Ctrl-C), saved; best checkpoint step 10, validation loss 1.5000; " in line
    assert "% of " in line
    assert line.endswith(f" spent training and validating; {counts}")
    assert last.endswith("rerun the same command to continue")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([train_line(20)], "no best checkpoint (never validated)"),
        ([train_line(20), validation_line(20, loss=1.5)], "no best checkpoint was saved"),
    ],
)
def test_the_last_line_names_no_best_checkpoint_if_none_was_saved(tmp_path, log_to, lines, said):
    log_to(tmp_path)
    tracker = tracker_of(tmp_path)
    for line in lines:
        tracker.log(line)
    tracker.close(state="finished", reason=None)
    assert f"; {said}; " in (tmp_path / "rank-0.log").read_text()
