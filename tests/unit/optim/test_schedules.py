import pytest
import torch

from dist_trainer.config.schema import ScheduleConfig
from dist_trainer.errors import ConfigError
from dist_trainer.optim.schedules import (
    SCHEDULES,
    build_schedule,
    set_learning_rates,
)


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


def test_warmup_stable_decay_reaches_the_peak_if_the_warmup_is_longer_than_four_fifths_of_the_run():
    factor = schedule("wsd", warmup_steps=100)
    assert factor(89) == pytest.approx(0.9)
    assert factor(99) == factor(100) == 1.0
    assert factor(105) == pytest.approx(0.55)


def test_a_schedule_that_does_not_exist_is_rejected_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"schedule\.name.*cosin.*cosine"):
        schedule("cosin")


def test_each_group_gets_its_own_initial_rate_times_the_factor():
    weight, bias, own = (torch.nn.Parameter(torch.ones(1)) for _ in range(3))
    capturable = torch.tensor(0.3)
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.02}, {"params": [own], "lr": capturable}]
    optimizer = torch.optim.SGD(groups, lr=0.7, foreach=False)
    for factor in (0.1, 1.0, 1 / 3):
        assert set_learning_rates(optimizer, factor) == 0.7 * factor
        assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.7 * factor, 0.02 * factor]
        assert optimizer.param_groups[2]["lr"] is capturable
        assert float(capturable) == pytest.approx(0.3 * factor)


def test_groups_may_share_one_tensor_as_their_rate():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(0.5), capturable=True)
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    for factor in (0.5, 1.0, 0.25):
        set_learning_rates(optimizer, factor)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5 * factor] * 2


def test_a_group_without_a_rate_is_left_alone():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    assert set_learning_rates(optimizer, 0.5) == 0.0
    assert optimizer.param_groups[0]["lr"] is None
