"""The list of trackers: what fails in one costs a warning and nothing else."""

from __future__ import annotations

import logging

import pytest

from dist_trainer.tracking.jsonl import JsonlTracker
from dist_trainer.tracking.subprocess_tracker import SubprocessTracker
from dist_trainer.tracking.tracker import TRACKERS, TrackerList, build_tracker
from tests.unit.tracking.runs import run_context, steps_of, train_line


def test_a_tracker_that_fails_costs_one_warning_and_the_others_continue(tmp_path, caplog):
    class Broken(TrackerList):
        def log(self, line):
            raise RuntimeError("no")

    trackers = TrackerList({"broken": Broken(), "jsonl": JsonlTracker(tmp_path, 0)})
    with caplog.at_level(logging.WARNING):
        trackers.log(train_line(1))
        trackers.log(train_line(2))
    trackers.close(state="finished", reason=None)
    assert steps_of(tmp_path) == [1, 2]
    assert [record.message for record in caplog.records] == ["tracking: broken failed (RuntimeError: no); training continues"]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_nothing_that_a_tracker_does_at_the_end_reaches_the_run(tmp_path, monkeypatch, caplog, kind):
    def refuse(*_, **__):
        raise kind("no")

    for method in ("ask_to_finish", "close"):
        monkeypatch.setattr(SubprocessTracker, method, refuse)
    export = SubprocessTracker.__new__(SubprocessTracker)
    trackers = TrackerList({"first": export, "jsonl": JsonlTracker(tmp_path, 0), "last": export})
    trackers.close(state="finished", reason=None)
    assert [record.message for record in caplog.records] == [
        f"tracking: {name} failed ({kind.__name__}: no); training continues" for name in ("first", "last")
    ]


def test_metrics_jsonl_comes_first_and_a_tracker_that_cannot_start_costs_a_warning(tmp_path, caplog):
    def refuse(run):
        raise OSError("no")

    trackers = build_tracker(run_context(tmp_path), {"mine": refuse})
    trackers.log(train_line(1))
    trackers.close(state="finished", reason=None)
    assert next(iter(TRACKERS)) == "jsonl"
    assert steps_of(tmp_path) == [1]
    assert [record.message for record in caplog.records] == ["tracking: mine cannot start (OSError: no); continuing without it"]
