"""What a run's lines become: metrics.jsonl, W&B's own files, throughput."""

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.tracking.events import StepCounter
from dist_trainer.tracking.jsonl import JsonlTracker
from dist_trainer.tracking.run_reader import complete_lines
from dist_trainer.tracking.subprocess_tracker import SubprocessTracker
from dist_trainer.tracking.throughput import Throughput, peak_flops
from dist_trainer.tracking.tracker import TRACKERS, TrackerList, build_tracker
from tests.unit.tracking.runs import run_context, sample_line, train_line, validation_line


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_what_is_made_up_for_at_the_step_of_a_resume_stands_once(tmp_path):
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


def test_a_tracker_that_fails_costs_one_warning_and_the_others_go_on(tmp_path, caplog):
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


def test_a_disk_that_refuses_the_end_of_a_finished_run_does_not_make_it_a_crash(tmp_path, monkeypatch):
    counter = StepCounter(tmp_path)
    close = os.close

    def close_and_refuse(file):
        close(file)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as changed:
        changed.setattr(os, "close", close_and_refuse)
        counter.close()
    assert list(complete_lines(Path("/proc/self/mem"))) == [], "it can be opened, but not read"


def test_metrics_jsonl_comes_first_and_a_tracker_that_cannot_start_costs_a_warning(tmp_path, caplog):
    def refuse(run):
        raise OSError("no")

    trackers = build_tracker(run_context(tmp_path), {"mine": refuse})
    trackers.log(train_line(1))
    trackers.close(state="finished", reason=None)
    assert next(iter(TRACKERS)) == "jsonl"
    assert steps_of(tmp_path) == [1]
    assert [record.message for record in caplog.records] == ["tracking: mine cannot start (OSError: no); continuing without it"]


def test_throughput_leaves_out_what_is_paused_but_for_what_is_awaited_of_steps():
    now = [0.0]
    throughput = Throughput(DistributedContext.single(), dtype="fp32", clock=lambda: now[0])
    throughput.start(step=10, tokens=1000)
    now[0] = 3.0
    with throughput.paused():
        with throughput.waiting_for_steps():
            now[0] = 3.5
        now[0] = 100.0
    with throughput.waiting_for_steps():
        now[0] = 100.5
    measured = throughput.measure(step=12, tokens=1800)
    assert measured["tokens_per_second"] == 200
    assert measured["step_seconds"] == 2
    assert measured["mfu"] is None


def test_saves_since_the_last_measurement_are_summed_up_and_without_one_there_is_no_stall():
    now = [0.0]
    throughput = Throughput(DistributedContext.single(), dtype="fp32", clock=lambda: now[0])
    for seconds in (0.25, 0.5):
        with throughput.saving():
            now[0] += seconds
    assert throughput.measure(step=1, tokens=1)["checkpoint_stall_ms"] == 750
    assert throughput.measure(step=2, tokens=2)["checkpoint_stall_ms"] is None
    with throughput.saving():
        pass
    assert throughput.measure(step=3, tokens=3)["checkpoint_stall_ms"] == 0


def test_peaks_are_known_by_name_and_unknown_otherwise():
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops("some other device", "bf16") is None
    assert peak_flops("NVIDIA H200", "fp32") is None


@pytest.mark.parametrize(
    "name", ["NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_a_device_whose_name_only_contains_that_of_another_is_unknown(name):
    assert peak_flops(name, "bf16") is None


def test_the_utilisation_is_what_the_docs_say(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dist_trainer.tracking.throughput.device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("dist_trainer.tracking.throughput.peak_memory_bytes", lambda device: 7)
    world = DistributedContext(world_size=4, device=torch.device("cuda", 0))
    throughput = Throughput(world, dtype="bf16", flops_per_token=1e9, clock=lambda: now[0])
    with throughput.waiting_for_data():
        now[0] = 0.5
    now[0] = 2.0
    measured = throughput.measure(step=2, tokens=1_000_000)
    assert measured["tokens_per_second"] == 500_000
    assert measured["mfu"] == pytest.approx(500_000 * 1e9 / (4 * 312e12))
    assert (measured["data_seconds"], measured["peak_memory_bytes"]) == (0.25, 7)
