import pytest

from dist_trainer.config.schema import ScheduleConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim.schedules import SCHEDULES, build_schedule, warn_of_unfinished_warmup


def schedule(name: str, *, warmup_steps: int = 10, min_lr_ratio: float = 0.1, total_steps: int = 110):
    config = ScheduleConfig(name=name, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    return build_schedule(config, total_steps)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up_in_a_straight_line(name):
    factor = schedule(name)
    assert factor(0) == pytest.approx(1 / 10)
    assert factor(4) == pytest.approx(5 / 10)
    assert factor(9) == 1.0
    assert factor(10) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_runs_at_the_peak(name):
    assert schedule(name, warmup_steps=0)(0) == 1.0


def test_cosine_is_halfway_in_the_middle_and_ends_at_the_minimum():
    factor = schedule("cosine")
    assert factor(60) == pytest.approx((1 + 0.1) / 2)
    assert factor(110) == pytest.approx(0.1)
    assert factor(10_000) == pytest.approx(0.1)


def test_linear_falls_in_a_straight_line():
    factor = schedule("linear")
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_constant_stays():
    assert schedule("constant")(109) == 1.0


def test_warmup_stable_decay_holds_until_four_fifths_of_the_run():
    factor = schedule("wsd")
    assert factor(88) == 1.0
    assert factor(99) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_a_schedule_that_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"schedule\.name.*cosin.*cosine"):
        schedule("cosin")


def test_a_run_that_ends_within_its_warmup_is_warned_of(caplog):
    warn_of_unfinished_warmup(ScheduleConfig(warmup_steps=5), 5)
    assert not caplog.text
    warn_of_unfinished_warmup(ScheduleConfig(warmup_steps=1000), 5)
    assert "schedule.warmup_steps: 1000, but the run has 5 steps" in caplog.text
