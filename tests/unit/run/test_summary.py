"""Which settings of a run are warned of, and with which numbers."""

import pytest

from dist_trainer.config.schema import OptimConfig, ScheduleConfig, TrainConfig
from dist_trainer.optim.schedules import SCHEDULES
from dist_trainer.run.summary import warn_of_changed_length, warn_of_default_learning_rate, warn_of_unfinished_warmup


@pytest.mark.parametrize(("parameters", "fitting"), [(135_000_000, "try 2e-5 ("), (2_400_000, "try 0.0005 (")])
def test_the_default_rate_for_a_model_that_was_trained_before_is_warned_of(caplog, parameters, fitting):
    warn_of_default_learning_rate(OptimConfig(), parameters=parameters, init_from="a/model")
    warn_of_default_learning_rate(OptimConfig(learning_rate=2e-5), parameters=parameters, init_from="a/model")
    (line,) = caplog.messages
    assert line.startswith("optim.learning_rate: 0.005 is the default, meant for small models with random weights; ")
    assert fitting in line
    assert "a/model" in line


def test_a_run_that_ends_within_its_warmup_is_warned_of(caplog):
    warn_of_unfinished_warmup(ScheduleConfig(warmup_steps=5), 5)
    assert not caplog.text
    warn_of_unfinished_warmup(ScheduleConfig(warmup_steps=1000), 5)
    assert "schedule.warmup_steps: 1000, but the run has only 5 steps" in caplog.text


def warning_of_length(
    caplog, now: TrainConfig, before: TrainConfig, *, step: int, name: str = "cosine", warmup_steps: int = 0
) -> str:
    schedule = ScheduleConfig(name=name, warmup_steps=warmup_steps, min_lr_ratio=0.1)
    caplog.clear()
    warn_of_changed_length(schedule, now, before, step=step, steps_per_epoch=10.0, peak=1.0)
    return caplog.text


@pytest.mark.parametrize(
    ("name", "last", "following"),
    [("cosine", "0.1", "0.55"), ("linear", "0.109", "0.55"), ("wsd", "0.145", "1"), ("constant", "", "")],
)
def test_a_finished_run_made_longer_is_warned_of_both_learning_rates(caplog, name, last, following):
    found = warning_of_length(caplog, TrainConfig(max_steps=200), TrainConfig(max_steps=100), step=100, name=name)
    if name == "constant":
        assert not found
    else:
        assert f"changes from {last} at step 100 to {following} at step 101" in found
        assert f"the schedule ({name}) now spans 200 steps, it spanned 100" in found


@pytest.mark.parametrize(
    ("now", "before", "step"),
    [
        (TrainConfig(epochs=20), TrainConfig(epochs=10), 100),
        (TrainConfig(epochs=20), TrainConfig(max_steps=100), 100),
        (TrainConfig(max_steps=200), TrainConfig(max_steps=200, epochs=10), 100),
        (TrainConfig(max_steps=600), TrainConfig(), 150),
        (TrainConfig(max_steps=200), TrainConfig(), 150),
    ],
    ids=["more epochs", "epochs for steps", "no epochs any more", "half-way, longer", "half-way, shorter"],
)
def test_every_key_that_changes_the_length_is_warned_of(caplog, now, before, step):
    assert f"at step {step + 1}: the schedule (cosine) now spans" in warning_of_length(caplog, now, before, step=step)


@pytest.mark.parametrize(
    ("now", "before", "step", "warmup_steps"),
    [
        (TrainConfig(max_steps=100), TrainConfig(epochs=10), 50, 0),
        (TrainConfig(max_steps=200), TrainConfig(max_steps=100), 0, 0),
        (TrainConfig(max_steps=200), TrainConfig(max_steps=100), 8, 50),
        (TrainConfig(max_steps=40), TrainConfig(max_steps=100), 60, 0),
    ],
    ids=["the same length", "no step done", "within the warmup", "no step left"],
)
def test_a_length_that_changes_no_learning_rate_is_not_warned_of(caplog, now, before, step, warmup_steps):
    assert not warning_of_length(caplog, now, before, step=step, warmup_steps=warmup_steps)


def test_a_stable_phase_that_continues_is_not_warned_about(caplog):
    assert not warning_of_length(caplog, TrainConfig(max_steps=200), TrainConfig(max_steps=100), step=79, name="wsd")


def test_a_user_s_own_schedule_is_not_called_beyond_its_end(caplog, monkeypatch):
    rates = [1.0, 0.5, 0.25, 0.2]
    monkeypatch.setitem(SCHEDULES, "listed", lambda step, span: rates[step if span.total_steps == 4 else step // 2])
    found = warning_of_length(caplog, TrainConfig(max_steps=8), TrainConfig(max_steps=4), step=4, name="listed")
    assert "changes from 0.2 at step 4 to 0.25 at step 5" in found
