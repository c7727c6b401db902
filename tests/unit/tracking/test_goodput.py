"""What a run's time went into."""

from dist_trainer.tracking.goodput import goodput
from dist_trainer.tracking.run_reader import RunHistory


def history(folder, events, steps):
    """A run with `events`, and a line of 2 seconds a step, 0.5 of them waiting for data, for each of `steps`."""
    run = RunHistory(folder, events=[{"lost_steps": 0, **event} for event in events])
    for step in steps:
        line = {"step": step, "step_seconds": 2.0, "data_seconds": 0.5, "time": 1000.0 + 2 * step}
        for name, column in run.train.items():
            column.append(line.get(name, float("nan")))
    return run


def test_steps_of_the_run_whose_checkpoint_was_gone_on_from_are_not_this_runs(tmp_path):
    spent = goodput(history(tmp_path, [{"event": "resume", "step": 100, "time": 1195.0}], [101, 110]))
    assert (spent.step_seconds, spent.data_seconds) == (15.0, 5.0)
    assert spent.restarts == 0
    assert spent.wall_seconds == 25.0


def test_a_run_starts_when_its_command_was_entered(tmp_path):
    events = [
        {"event": "start", "step": 0, "time": 1000.0, "began": 980.0},
        {"event": "resume", "step": 5, "time": 1030.0, "began": 1010.0, "lost_steps": 3},
    ]
    spent = goodput(history(tmp_path, events, [10]), now=1040.0)
    assert spent.wall_seconds == 60.0
    assert (spent.restarts, spent.lost_steps) == (1, 3)
    assert spent.share == 20 / 60


def test_a_second_start_at_step_0_is_a_restart(tmp_path):
    start = {"event": "start", "step": 0, "time": 1000.0}
    assert goodput(history(tmp_path, [start, {"event": "failed", "step": 2, "time": 1001.0}, start], [4])).restarts == 1


def test_pauses_for_checkpoints_are_in_seconds_though_lines_have_milliseconds(tmp_path):
    run = history(tmp_path, [{"event": "start", "step": 0, "time": 1000.0}], [1, 2, 3])
    run.train["checkpoint_stall_ms"][0], run.train["checkpoint_stall_ms"][2] = 1500.0, 250.0
    assert goodput(run).saving_seconds == 1.75
