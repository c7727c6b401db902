"""Before ranks can compute together all must have come: who has not is named, and nobody waits for hours."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.preemption import StopRequest
from dist_trainer.distributed.world import World
from dist_trainer.errors import PeerLostError, StoppedError
from tests.distributed.ranks import run_ranks

SECONDS = 1.5
SHORT = DistributedConfig(timeout_minutes=SECONDS / 60)
STAYS_AWAY = "stays away"


def come(*, without: int):
    """What a rank finds out about the one that does not come: the message, who tells it, and after how many seconds."""
    if int(os.environ["RANK"]) == without:
        return STAYS_AWAY
    began = time.monotonic()
    try:
        with World.join(SHORT):
            return "all came"
    except PeerLostError as error:
        return str(error), error.told_by, time.monotonic() - began


@pytest.mark.parametrize(("without", "told_by"), [(0, 1), (1, 0), (2, 0)])
def test_a_rank_that_does_not_come_is_named_after_the_first_steps_patience(without, told_by):
    found = run_ranks(3, lambda: come(without=without))
    assert found.pop(without) == STAYS_AWAY
    for message, teller, seconds in found:
        assert message.startswith(f"rank {without} has not come within 2 s (distributed.timeout_minutes)")
        assert teller == told_by, "one rank says it"
        assert SECONDS - 0.1 < seconds < SECONDS + 10


def test_who_has_come_waits_for_the_others_for_long():
    """The patience of the meeting is not that of what follows: the heartbeat knows what is worth waiting for."""

    def wait():
        with World.join(SHORT) as world:
            if world.is_main:
                time.sleep(3 * SECONDS)
            total = torch.ones(())
            dist.all_reduce(total)
            return float(total)

    assert run_ranks(2, wait) == [2.0, 2.0]


def test_a_signal_ends_the_waiting_at_once():
    def wait():
        if os.environ["RANK"] == "1":
            return STAYS_AWAY
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with StopRequest().listen() as stop_request:
            try:
                with World.join(DistributedConfig(timeout_minutes=1), stop_request=stop_request):
                    return "all came"
            except StoppedError:
                return time.monotonic() - began

    assert run_ranks(2, wait)[0] < 10
