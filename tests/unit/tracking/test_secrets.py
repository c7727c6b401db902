"""Each file that a run writes has its secrets masked, whoever hands them over."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.html_report.page import html_report
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.tracking.run_reader import RunHistory, SampleText, read_run
from dist_trainer.tracking.status import amend_status, append_event, write_status
from dist_trainer.tracking.tracker import TrackerList
from tests.unit.tracking.runs import sample_line

SECRET = "open-up-<now>"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)


def test_in_events_and_status(tmp_path: Path) -> None:
    append_event(tmp_path, "failed", step=1, reason=f"no access with {SECRET}")
    write_status(tmp_path, "failed", step=1, max_steps=2, reason=f"no access with {SECRET}")
    amend_status(tmp_path, more=SECRET)
    run = read_run(tmp_path)
    assert run.events[0]["reason"] == run.status["reason"] == "no access with ***"
    assert run.status["more"] == "***"


def test_in_the_lines_of_trackers() -> None:
    lines: list[dict[str, Any]] = []

    class Lines:
        log = staticmethod(lines.append)

    anything: Any = Lines()
    TrackerList({"lines": anything}).log(sample_line(1, f"a text with {SECRET}"))
    assert lines == [sample_line(1, "a text with ***")]


def test_in_the_command_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "--api_key", "another one", SECRET])
    assert describe_environment(DistributedContext.single())["command"] == "python --api_key '***' '***'"


@pytest.mark.parametrize("name", ["samples", "events", "config", "status", "environment"])
def test_in_every_part_of_a_report(tmp_path: Path, name: str) -> None:
    """The files of a run may come from elsewhere, and HTML spells a secret in other characters."""
    parts: dict[str, Any] = {
        "samples": [SampleText(1, f"a prompt with {SECRET}", f"a text with {SECRET}", 1.0)],
        "events": [{"event": "failed", "step": 1, "time": 1.0, "reason": SECRET}],
        "config": {"tracking": {"wandb_tags": SECRET}},
        "status": {"state": "failed", "reason": SECRET},
        "environment": {"command": SECRET},
    }
    page = html_report([replace(RunHistory(tmp_path / "run"), **{name: parts[name]})])
    assert "***" in page
    assert "open-up" not in page
