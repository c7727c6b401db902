"""metrics.jsonl: exact, valid JSON, and cut at the step that a run resumes from."""

from __future__ import annotations

import json
import math

from dist_trainer.tracking.jsonl import JsonlTracker
from tests.unit.tracking.runs import sample_line, steps_of, train_line, validation_line


def test_metrics_read_back_exactly_and_are_valid_json_even_when_not_finite(tmp_path):
    tracker = JsonlTracker(tmp_path, 0)
    tracker.log(train_line(1, 0.1 + 0.2))
    tracker.log(train_line(2, math.nan))
    tracker.close(state="finished", reason=None)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == 0.1 + 0.2
    assert second["loss"] is None


def test_on_resume_lines_past_the_checkpoint_and_a_torn_one_are_dropped(tmp_path):
    tracker = JsonlTracker(tmp_path, 0)
    for step in range(1, 8):
        tracker.log(train_line(step))
    tracker.close(state="failed", reason=None)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    tracker = JsonlTracker(tmp_path, 4)
    tracker.log(train_line(5))
    tracker.close(state="finished", reason=None)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_what_is_repeated_at_the_step_of_a_resume_is_there_once(tmp_path):
    tracker = JsonlTracker(tmp_path, 0)
    for line in (train_line(4), validation_line(4)):
        tracker.log(line)
    tracker.close(state="failed", reason=None)
    tracker = JsonlTracker(tmp_path, 4)
    for line in (validation_line(4), sample_line(4, "a truth"), train_line(5)):
        tracker.log(line)
    tracker.close(state="finished", reason=None)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds == ["train", "validation", "sample", "train"]
