"""Numbers that are not finite: no rank updates, none is saved, and what was saved stays."""

import math

import pytest

from tests.distributed.small_runs import command
from tests.faults.faults import poison_gradient


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_poisoned_gradient_on_one_rank_stops_both_before_the_update(run, dtype):
    config = run.but(precision__dtype=dtype, batch__micro_batch_size=2)
    poison = poison_gradient(rank=0, at_step=5)
    assert command(config, 2, before=lambda _: poison()) == [3, 3]
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert "step 5" in status["reason"]
    assert run.saved_steps() == [3]
    assert command(config, 2) == [0, 0]
    assert run.resumed_at()[-1] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_was_stopped_by_a_poisoned_gradient_goes_on_from_its_last_good_checkpoint(run, undisturbed, value):
    assert run.start(poison_gradient(at_step=8, value=value)).code == 3
    assert run.saved_steps()[-1] == 6
    run.finish()
    run.equals(undisturbed)
