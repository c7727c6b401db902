"""W&B online, and `wandb sync`, against a stand-in for its server: what it has in the end, whatever happened to the run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.tracking import subprocess_tracker
from dist_trainer.tracking.sink import LogCursor
from dist_trainer.tracking.tracker import TRACKERS, TrackerList, export_tracker
from tests.faults.faults import kill
from tests.faults.processes import children_of, is_alive, wait_until
from tests.pace import allowed
from tests.unit.tracking.runs import run_context, sample_line, train_line
from tests.wandb_server import SentRun, WandbServer

STEPS = list(range(1, 13))
"""Of the run of conftest.py."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    # Importing wandb and sending must end within it, from a process at nice 10 on a machine that tests fill.
    monkeypatch.setattr(subprocess_tracker, "SECONDS_TO_FINISH", 60.0)
    with WandbServer() as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        yield server


def only_run(server: WandbServer) -> SentRun:
    assert len(server.runs) == 1, "whatever happened, it is one run"
    sent = next(iter(server.runs.values()))
    assert [at for at in sent.overwritten + sent.gaps if at[0] == "wandb-history.jsonl"] == []
    return sent


def sync(folder: Path) -> str:
    """What docs/tracking.md says."""
    parts = sorted(map(str, folder.glob("wandb/offline-run-*")))
    assert parts
    words = [sys.executable, "-m", "wandb", "sync", *parts]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)  # it makes a wandb/ in its working folder
    assert done.returncode == 0, done.stderr
    return done.stderr


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Trackers:
    """metrics.jsonl and W&B without a training around them: one attempt of a run."""

    def __init__(self, folder: Path, *, start_step: int = 0, mode: Any = "online") -> None:
        context = run_context(folder, start_step=start_step, wandb=mode)
        self._folder, self._next = folder, start_step + 1
        export = export_tracker(context, "wandb")
        assert export._process is not None
        self.pid = export._process.pid
        self._trackers = TrackerList({"jsonl": TRACKERS["jsonl"](context), "wandb": export})

    def log(self, *, up_to: int) -> None:
        """Lines, of which all but the last are handed to W&B when this returns."""
        for step in range(self._next, up_to + 1):
            self._trackers.log(train_line(step))
        self._next = up_to + 1
        wait_until(lambda: LogCursor.read(self._folder, "wandb").step == up_to)

    def sample(self) -> None:
        self._trackers.log(sample_line(self._next - 1, "a truth"))

    def finish(self) -> None:
        self._trackers.close(state="finished", reason=None)

    def lose_the_machine(self) -> None:
        """All that sends is gone at once, with what it had not sent."""
        processes = [self.pid, *children_of(self.pid)]
        assert len(processes) > 1, "wandb-core"
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, processes)))
        self._trackers.close(state="failed", reason="of no consequence: nobody listens any more")


def test_rank_0_alone_sends_config_history_summary_and_samples_to_wandb_s_server(run, server):
    config = run.but(tracking__wandb="online", tracking__sample_tokens=4, tracking__wandb_project="books")
    ended = run.start(config=config, ranks=2)
    assert ended.code == 0, ended.said
    sent = only_run(server)
    assert (sent.starts, sent.project, sent.exit_codes) == (1, "books", [0])
    assert sent.config["optim"]["learning_rate"] == config.optim.learning_rate
    assert sent.config["environment"]["world_size"] == 2
    assert sent.steps == [row["step"] for row in sent.history] == STEPS
    assert [row["train/loss"] for row in sent.history] == [line["loss"] for line in run.lines()]
    best = min(run.lines("validation"), key=lambda line: line["loss"])
    metadata = ("best_validation_loss", "best_step", "state")
    assert tuple(sent.summary[name] for name in metadata) == (best["loss"], best["step"], "finished")
    table = json.loads(sent.files[sent.summary["samples"]["path"]])
    assert table["data"] == [[line["step"], line["prompt"], line["text"]] for line in run.lines("sample")]
    assert f"W&B: complete at {server.url}/us/books/runs/" in ended.said


@pytest.mark.slow  # two export processes, one after the other
def test_a_run_that_was_killed_resumes_online_as_the_same_run_with_each_step_once(run, server):
    config = run.but(tracking__wandb="online")
    server.may_answer.clear()  # so that what sends the steps of the first attempt is not done when that of the second begins
    assert run.start(kill(at_step=7), config=config).was_killed
    lock = run.folder / "logs" / "wandb.lock"
    wait_until(lambda: is_locked(lock))
    second = run.begin(config=config)
    wait_until(lambda: len(run.lines()) == len(STEPS))
    server.may_answer.set()
    ended = second.wait()
    assert ended.code == 0, ended.said
    sent = only_run(server)
    assert sent.steps == STEPS
    assert (sent.starts, sent.exit_codes, sent.summary["state"]) == (2, [1, 0], "finished")


def test_offline_parts_of_a_run_that_was_killed_are_one_run_with_each_step_once_after_wandb_sync(run, server):
    config = run.but(tracking__wandb="offline")
    assert run.start(kill(at_step=7), config=config).was_killed
    ended = run.start(config=config)
    assert ended.code == 0, ended.said
    assert server.operations == []
    sync(run.folder)
    sent = only_run(server)
    assert sent.steps == STEPS
    assert (sent.exit_codes, sent.summary["state"]) == ([1, 0], "finished")


@pytest.mark.slow  # wandb-core sends every 15 seconds
def test_what_was_handed_to_wandb_but_not_sent_when_the_machine_was_lost_is_sent_by_the_next_start(tmp_path, server):
    first = Trackers(tmp_path)
    first.log(up_to=3)
    wait_until(lambda: bool(server.runs) and only_run(server).steps != [])
    server.status_of = lambda path: 500
    first.log(up_to=6)
    first.lose_the_machine()
    assert max(only_run(server).steps) < 6
    server.status_of = lambda path: 200
    second = Trackers(tmp_path, start_step=5)
    second.log(up_to=8)
    second.finish()
    assert only_run(server).steps == STEPS[:8]


@pytest.mark.slow  # four attempts
def test_what_was_recorded_offline_is_sent_by_the_next_start_online_and_never_again_by_sync(tmp_path, server):
    for start, stop, mode in ((0, 3, "offline"), (2, 5, "online"), (5, 6, "offline"), (6, 8, "online")):
        attempt = Trackers(tmp_path, start_step=start, mode=mode)
        attempt.log(up_to=stop)
        attempt.finish()
    assert only_run(server).steps == STEPS[:8]
    assert "Skipped 2 synced run(s)" in sync(tmp_path)
    assert only_run(server).steps == STEPS[:8]


@pytest.mark.parametrize("trouble", [pytest.param("down", marks=pytest.mark.slow), "key"])
def test_a_server_that_is_down_or_rejects_the_key_makes_it_an_offline_run(run, server, trouble, monkeypatch):
    if trouble == "down":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the port of "discard": nobody listens
    server.status_of = lambda path: 401
    ended = run.start(config=run.but(tracking__wandb="online"))
    assert ended.code == 0, ended.said
    assert "warning: W&B cannot be used online (" in ended.said
    assert "recording offline instead" in ended.said
    assert re.search(rf"recorded offline; upload it with `(\S*/)?wandb sync {run.folder}/wandb/offline-run-\*`", ended.said)
    assert server.runs == {}
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    server.status_of = lambda path: 200
    for _ in range(2 if trouble == "down" else 1):  # to sync once more does no harm
        sync(run.folder)
        assert only_run(server).steps == STEPS


def test_a_server_that_never_answers_costs_the_end_seconds_and_the_same_command_sends_all(run, server, monkeypatch):
    monkeypatch.setattr(subprocess_tracker, "SECONDS_TO_FINISH", 4.0)
    server.may_answer.clear()
    config = run.but(tracking__wandb="online")
    began = time.monotonic()
    ended = run.start(config=config)
    assert time.monotonic() - began < allowed(60), "it waits for 4 s, and not as long as the server keeps it waiting"
    assert ended.code == 0, "training has finished all the same"
    assert (
        "W&B did not finish within 4 s and was ended; metrics.jsonl has everything, and the same command sends the rest"
        in ended.said
    )
    server.may_answer.set()
    monkeypatch.setattr(subprocess_tracker, "SECONDS_TO_FINISH", 60.0)
    again = run.start(config=config)
    assert "has already finished its 12 steps" in again.said
    assert "W&B: complete at" in again.said
    assert only_run(server).steps == STEPS
    assert "W&B" not in run.start(config=config).said, "nothing is left to send"


@pytest.mark.slow  # wandb-core tries again for some seconds
def test_a_key_that_is_revoked_during_the_run_is_reported_at_the_end_and_the_next_start_sends_the_rest(
    tmp_path, server, caplog
):
    caplog.set_level("INFO")
    first = Trackers(tmp_path)
    first.log(up_to=2)
    wait_until(lambda: bool(server.runs) and only_run(server).steps != [])
    server.status_of = lambda path: 403 if "file_stream" in path else 200
    first.log(up_to=4)
    first.finish()
    assert "W&B: its server refused part of" in caplog.text
    assert "complete at" not in caplog.text
    server.status_of = lambda path: 200
    second = Trackers(tmp_path, start_step=4)
    second.log(up_to=5)
    second.finish()
    assert only_run(server).steps == STEPS[:5]
    assert "W&B: complete at" in caplog.text


def test_a_server_that_fails_while_a_sample_is_sent_costs_no_entry(tmp_path, server):
    attempt = Trackers(tmp_path)
    attempt.log(up_to=2)
    wait_until(lambda: bool(server.runs))
    refused: list[str] = []

    def refuse_questions(path: str) -> int:
        if path != "/graphql":
            return 200
        refused.append(path)
        return 500

    server.status_of = refuse_questions
    attempt.sample()
    attempt._trackers.log(train_line(3))
    wait_until(lambda: bool(refused))
    server.status_of = lambda path: 200
    attempt.finish()
    assert only_run(server).steps == STEPS[:3]
    assert only_run(server).history[1]["samples"]["nrows"] == 1
