"""What a run's folder says after the run has ended, also if it was killed, shortened, or started from another run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dist_trainer.checkpoint.state import Progress, take_snapshot
from dist_trainer.run.record import RunRecord
from dist_trainer.tracking.status import write_status
from dist_trainer.training import saving
from tests.distributed.small_runs import folder, metrics, run, small_config, status, stop_after
from tests.faults.processes import Process


def test_a_run_that_starts_from_another_run_s_checkpoint_counts_its_own_steps(stories, tmp_path):
    first = small_config(stories, tmp_path)
    run(first, 1, before=stop_after(6))
    second = small_config(stories, tmp_path, run_name="second", checkpoint__resume=str(folder(first)))
    assert run(second, 1) == [0]
    ended = status(second)
    assert ended["restarts"] == 0
    own = sum(line["step_seconds"] for line in metrics(second)) + sum(line["seconds"] for line in metrics(second, "validation"))
    assert abs(ended["useful_seconds"] - own) < 1e-6
    assert ended["useful_seconds"] < ended["wall_seconds"]


def test_a_finished_run_that_was_killed_before_it_recorded_that_is_finished_at_the_next_start(stories, tmp_path, monkeypatch):
    config = small_config(stories, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "finish", lambda *_: None)
        assert run(config, 1) == [0]
    report = folder(config) / "report.html"
    report.unlink()
    assert status(config)["state"] == "running"
    assert run(config, 1) == [0]
    ended = status(config)
    assert (ended["state"], ended["step"], ended["exit_code"], ended["restarts"]) == ("finished", 12, 0, 0)
    assert ended["best_loss"] == min(line["loss"] for line in metrics(config, "validation"))
    assert report.is_file()
    assert run(config, 1) == [0]
    events = [json.loads(line)["event"] for line in (folder(config) / "logs" / "events.jsonl").read_text().splitlines()]
    assert events == ["start", "first checkpoint", "finished"], "once is enough"


@pytest.mark.parametrize("ends_by", ["its steps", "a signal"])
def test_only_the_last_state_is_saved_without_a_copy(stories, tmp_path, monkeypatch, ends_by):
    copied = tmp_path / "copied"

    def noting(*parts, is_last, **others):
        with copied.open("a") as file:
            file.write(f"{others['progress'].step} {is_last}\n")
        return take_snapshot(*parts, is_last=is_last, **others)

    monkeypatch.setattr(saving, "take_snapshot", noting)
    config = small_config(stories, tmp_path, checkpoint__every_steps=4, validation__every_steps=0)
    last = 12 if ends_by == "its steps" else 6
    run(config, 1, before=stop_after(6) if ends_by == "a signal" else None)
    saved = [line.split() for line in copied.read_text().splitlines()]
    assert status(config)["step"] >= last
    assert [is_last for _, is_last in saved] == ["False"] * (len(saved) - 1) + ["True"]
    assert int(saved[-1][0]) == status(config)["step"]


def test_max_steps_below_the_reached_step_means_finished(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path, validation__every_steps=100)
    run(config, 1, before=stop_after(8))
    reached = status(config)["step"]
    shorter = small_config(stories, tmp_path, validation__every_steps=100, train__max_steps=6)
    capfd.readouterr()
    assert run(shorter, 1) == [0]
    said = capfd.readouterr().err
    assert f"no step left after {reached}, only the last validation" in said
    assert f"finished: {reached} steps, past the 6 planned" in said
    ended = status(shorter)
    assert (ended["state"], ended["step"], ended["best_step"]) == ("finished", reached, reached)
    assert [line["step"] for line in metrics(shorter, "validation")] == [reached]
    for _ in range(2):
        assert run(shorter, 1) == [0]
        assert f"is already at step {reached}, past train.max_steps 6" in capfd.readouterr().err
    assert status(shorter) == ended


def test_the_first_rank_to_record_why_the_run_failed_is_not_contradicted(stories, tmp_path):
    config = small_config(stories, tmp_path)
    run(config, 1, before=stop_after(6))
    write_status(folder(config), "failed", step=6, max_steps=12, reason="rank 0 hangs")
    recorded = status(config)

    def note(began: float) -> int:
        record = RunRecord(config, began=began)
        record.on_fit_start(SimpleNamespace(progress=Progress(step=6), max_steps=12))
        record.on_fatal("gone")
        return 0

    assert Process(lambda: note(recorded["time"] - 1)).wait().code == 0
    assert status(config) == recorded
    assert Process(lambda: note(recorded["time"] + 1)).wait().code == 0, "of an earlier attempt"
    assert status(config)["reason"] == "gone"
