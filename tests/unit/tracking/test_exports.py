"""W&B, TensorBoard and trackio: what a run with a restart leaves there, read back by each package's own means."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dist_trainer
from dist_trainer.config.schema import TrackingConfig
from dist_trainer.errors import ConfigError
from dist_trainer.tracking.export_process import SINKS, send_lines
from dist_trainer.tracking.run_reader import parse_line
from dist_trainer.tracking.sink import LogCursor
from dist_trainer.tracking.subprocess_tracker import (
    EXPORTS,
    check_packages,
    describe_run,
    format_exports,
)
from dist_trainer.tracking.tracker import TRACKERS, TrackerList, export_tracker, send_to_wandb
from dist_trainer.tracking.wandb_sink import WandbSink, run_id
from tests.unit.tracking.runs import run_context, train_line, validation_line

STEPS = [1, 2, 3, 4, 5]
LOSS = {1: 2.9, 2: math.nan, 3: 2.7, 4: 2.6, 5: 2.5}


COMMIT = {"git_commit": "0123abc", "git_dirty": True}


def describe(folder: Path, **tracking: Any) -> dict[str, Any]:
    return describe_run("wandb", folder, TrackingConfig(**tracking), run_name="default", config={})


def sample_line(step: int) -> dict[str, Any]:
    return {"kind": "sample", "step": step, "prompt": "Once", "text": f"upon {step}", "time": 1e9 + step}


def run_with_a_restart(folder: Path, entry: str, **tracking: Any) -> None:
    """Steps 1 to 3, killed there after the checkpoint of step 2, then 3 to 5."""
    for start, stop in ((0, 3), (2, 5)):
        run = run_context(folder, start_step=start, environment=COMMIT, **tracking)
        trackers = TrackerList({name: TRACKERS[name](run) for name in ("jsonl", entry)})
        for step in range(start + 1, stop + 1):
            trackers.log(train_line(step, LOSS[step]))
            if step in (2, 5):
                trackers.log(validation_line(step, 2.0 + step / 100))
                trackers.log(sample_line(step))
        trackers.close(state="finished", reason=None)


def offline_records(folder: Path) -> list[dict[str, Any]]:
    """All W&B files of a run, in order, by wandb's own tool."""
    logs = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2, "one for each attempt"
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    tools = [subprocess.Popen([*words, str(log)], stdout=subprocess.PIPE, text=True) for log in logs]
    outputs = [tool.communicate()[0] for tool in tools]
    assert [tool.returncode for tool in tools] == [0, 0]
    return [json.loads(line) for output in outputs for line in output.splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record[kind] for record in records if record["type"] == kind]


def test_offline_wandb_files_are_one_run_with_each_step_once_also_after_a_restart(tmp_path):
    run_with_a_restart(tmp_path, "wandb", wandb="offline", wandb_tags="small, first", wandb_group="tries", wandb_code=True)
    records = offline_records(tmp_path)
    rows = [history["item"] for history in of_kind(records, "history")]
    assert [row["step"] for row in rows if "train/loss" in row] == STEPS
    assert [row["_step"] for row in rows] == STEPS, "what W&B counts by is the step too"
    assert [row["validation/best_loss"] for row in rows if "validation/loss" in row] == [2.02, 2.02]
    runs = of_kind(records, "run")
    assert {run["run_id"] for run in runs} == {(tmp_path / "wandb/run_id").read_text().strip()}
    assert {(run["project"], run["display_name"], run["run_group"], tuple(run["tags"])) for run in runs} == {
        ("dist_trainer", "default", "tries", ("small", "first"))
    }
    config = runs[0]["config"]["update"]
    assert config["optim"]["learning_rate"] == 0.005
    assert config["environment"] == {"git_commit": "0123abc", "git_dirty": True}
    metrics = of_kind(records, "metric")
    assert {metric.get("step_metric") for metric in metrics} == {"step"}
    assert [metric["summary"] for metric in metrics if metric.get("name") == "validation/loss"] == [{"min": True}] * 2
    last: dict[str, Any] = {}
    for summary in of_kind(records, "summary"):
        last |= summary["update"]
    assert (last["best_validation_loss"], last["best_step"], last["state"]) == (2.02, 2, "finished")
    code = next(artifact for artifact in of_kind(records, "artifact") if artifact["type"] == "code")
    package = Path(dist_trainer.__file__).parent
    sent = {entry["path"] for entry in code["manifest"]["contents"]}
    assert sent == {file.relative_to(package).as_posix() for file in package.rglob("*.py")}
    newest = max(tmp_path.glob("wandb/offline-run-*/files/media/table/samples_5_*.json"))
    assert json.loads(newest.read_text())["data"] == [[2, "Once", "upon 2"], [5, "Once", "upon 5"]]


def test_tensorboard_has_each_step_once_in_one_file_also_after_a_restart(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with_a_restart(tmp_path, "tensorboard")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    loss = {event.step: event.value for event in read.Scalars("train/loss")}
    assert loss == pytest.approx(LOSS, nan_ok=True)
    assert [event.step for event in read.Scalars("train/loss")] == STEPS
    assert [event.wall_time for event in read.Scalars("train/loss")] == [1e9 + step for step in STEPS]
    assert [(event.step, event.value) for event in read.Scalars("validation/loss")] == [
        (2, pytest.approx(2.02)),
        (5, pytest.approx(2.05)),
    ]
    samples = [(event.step, event.tensor_proto.string_val[0].decode()) for event in read.Tensors("sample")]
    assert samples == [(2, "**Once** upon 2"), (5, "**Once** upon 5")]
    assert b"learning_rate: 0.005" in read.Tensors("config")[0].tensor_proto.string_val[0]


@pytest.mark.slow
def test_trackio_has_each_step_once_in_one_run_also_after_a_restart_and_next_to_a_namesake(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "home"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run_with_a_restart(tmp_path / name, "trackio", wandb_project="books", wandb_group="tries")
    read = """if True:
        import json, trackio
        from trackio.sqlite_storage import SQLiteStorage
        runs = [(run.id, run.name) for run in trackio.Api().runs("books")]
        print(json.dumps([[name, SQLiteStorage.get_logs("books", run_id=i)] for i, name in runs]))"""
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, _ in runs] == ["default", "default"]
    for _, logs in runs:
        assert [row["step"] for row in logs if "train/loss" in row] == STEPS
        assert [row["train/loss"] for row in logs if "train/loss" in row][2:] == [2.7, 2.6, 2.5]
        assert [row["sample"]["_value"] for row in logs if "sample" in row] == ["**Once** upon 2", "**Once** upon 5"]


def test_export_processes_that_do_not_answer_are_ended_after_one_patience_for_all(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dist_trainer.tracking.subprocess_tracker.SECONDS_TO_STOP", 0.5)
    trackers = {str(number): export_tracker(run_context(tmp_path), "wandb") for number in range(3)}
    processes = [tracker._process for tracker in trackers.values()]
    for process in processes:
        assert process is not None
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    TrackerList(trackers).close(state="preempted", reason="SIGTERM")
    assert time.monotonic() - began < 1.4, "not 0.5 s after one another"
    assert [process.returncode for process in processes if process is not None] == [-signal.SIGKILL] * 3
    assert caplog.text.count("W&B did not finish within 0 s and was ended") == 3


def test_a_run_with_more_than_1023_open_files_ends_as_any_other(tmp_path, monkeypatch, caplog, many_open_files):
    """As rank 0 of some hundred ranks has; `select` takes no larger descriptor."""
    monkeypatch.setattr("dist_trainer.tracking.subprocess_tracker.SECONDS_TO_STOP", 0.5)
    tracker = export_tracker(run_context(tmp_path), "wandb")
    assert tracker._pipe > 1023
    assert tracker._process is not None
    tracker._process.send_signal(signal.SIGSTOP)
    TrackerList({"wandb": tracker}).close(state="preempted", reason="SIGTERM")
    assert "W&B did not finish within 0 s and was ended" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_an_entry_whose_package_is_missing_is_rejected_with_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"tracking.{name}: true needs the package {name}, .* -m pip install {name}`"):
        check_packages(TrackingConfig(**{name: True}))
    check_packages(TrackingConfig())


def test_what_goes_wrong_with_the_rest_of_a_finished_run_costs_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("dist_trainer.tracking.subprocess_tracker._start_process", refuse)
    send_to_wandb(run_context(tmp_path, wandb="online"))
    assert "the rest of this run could not be sent to W&B (RuntimeError: can't start new thread)" in caplog.text


def test_every_entry_has_a_key_and_a_sink():
    assert SINKS.keys() == EXPORTS.keys() <= vars(TrackingConfig()).keys()


def test_a_line_counts_however_long_its_sample_is_and_what_is_none_does_not():
    line = {"kind": "sample", "step": 3, "text": "x" * (2 << 20)}
    assert parse_line(json.dumps(line).encode()) == line
    for other in ({**line, "step": -1}, {**line, "step": 1.5}, {"step": 3}, [line]):
        assert parse_line(json.dumps(other).encode()) is None
    assert parse_line(b'{"kind": "train"') is None


def test_what_the_config_leaves_open_comes_from_wandb_s_own_variables(tmp_path, monkeypatch):
    names = {"WANDB_PROJECT": "theirs", "WANDB_RUN_GROUP": "them", "WANDB_MODE": "disabled"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    description = describe(tmp_path)
    assert (description["project"], description["group"], description["mode"]) == ("theirs", "them", "disabled")
    assert not EXPORTS["wandb"].is_enabled(TrackingConfig(wandb="online"))
    description = describe(tmp_path, wandb_project="mine", wandb_group="us")
    assert (description["project"], description["group"]) == ("mine", "us")


@pytest.mark.slow  # W&B takes seconds to import
def test_the_address_of_an_online_run_is_printed_at_once_and_at_the_end(tmp_path, monkeypatch):
    import wandb

    class Online(wandb.Run):
        url = "https://wandb.example/us/mine/runs/1a2b3c4d"

    def init_without_server(**asked: Any) -> Any:
        run: Any = really(**{**asked, "mode": "offline"})
        run.__class__ = Online
        return run

    really = wandb.init
    monkeypatch.setattr(wandb, "init", init_without_server)
    monkeypatch.setattr("dist_trainer.tracking.wandb_sink._reach", lambda address: None)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))  # the sink sets them; so they are set back
    messages: list[str] = []
    sink = WandbSink(describe(tmp_path, wandb="online"), lambda text, *_: messages.append(text))
    sink.finish("finished")
    wandb.teardown()
    assert messages == [f"W&B: {Online.url}"]
    assert sink.summary() == f"complete at {Online.url}"


def test_a_run_keeps_the_id_that_wandb_s_variable_gave_it_first(tmp_path):
    assert run_id(tmp_path, {"WANDB_RUN_ID": "sw33p-1"}) == "sw33p-1"
    assert run_id(tmp_path, {"WANDB_RUN_ID": "other"}) == "sw33p-1"
    assert run_id(tmp_path, {}) == "sw33p-1"
    assert len(run_id(tmp_path / "new", {"WANDB_RUN_ID": "../x"})) == 8


def test_the_entries_that_are_enabled_are_named_with_their_details(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert format_exports(TrackingConfig()) == "W&B offline (project dist_trainer)"
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert format_exports(TrackingConfig(tensorboard=True)) == "W&B online (project mine), TensorBoard"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert format_exports(TrackingConfig()) == "no W&B"


def test_the_cursor_of_a_run_made_under_the_older_name_is_read_so_that_no_step_is_sent_twice(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "logged.json").write_text('{"step": 3, "kinds": ["train"], "has_arrived": true}')
    cursor = LogCursor.read(tmp_path, "wandb")
    assert (cursor.step, cursor.kinds, cursor.is_synced) == (3, ["train"], True)
    assert cursor.has_passed(train_line(3))
    cursor.advance(validation_line(3), tmp_path, "wandb")
    assert LogCursor.read(tmp_path, "wandb") == LogCursor(3, ["train", "validation"])


def test_lines_that_come_late_and_have_no_numbers_are_not_sent(tmp_path):
    taken: list[dict[str, Any]] = []
    lines = [train_line(1, 2.0), train_line(2, 1.9), {"kind": "digest", "step": 1, "digest": "0" * 64}, train_line(3, 1.8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sink: Any = SimpleNamespace(take=taken.append)
    assert send_lines(sink, tmp_path / "metrics.jsonl", 0) == (tmp_path / "metrics.jsonl").stat().st_size
    assert [line["step"] for line in taken] == [1, 2, 3]
