"""When a rank is silent: the store always has its last beat, so only a new number is a sign of life."""

from __future__ import annotations

from typing import Any

import pytest

from dist_trainer.distributed.beats import Beat, encode_beat
from dist_trainer.distributed.peers import Peers
from dist_trainer.storage.processes import ProcessId

PATIENCE = 4.5


class Clock:
    """As many seconds as it was advanced."""

    seconds = 0.0

    def now(self) -> float:
        return self.seconds


class Rounds:
    """Stands for the event that ends the exchange: a second passes before each round, and there are `rounds`."""

    def __init__(self, clock: Clock, rounds: int) -> None:
        self.clock, self.rounds = clock, rounds

    def wait(self, _: float) -> bool:
        self.clock.seconds += 1
        self.rounds -= 1
        return self.rounds < 0


class Store:
    """What the other rank has sent, one number of a beat for each round; the last one stays."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.sent = numbers, {}

    def set(self, key: str, value: str) -> None:
        self.sent[key] = value

    def multi_get(self, keys: list[str]) -> list[str]:
        number = self.numbers.pop(0) if len(self.numbers) > 1 else self.numbers[0]
        other = encode_beat(Beat(step=3, phase="training", patience_seconds=PATIENCE, number=number))
        return [self.sent.get(key, other) for key in keys]


@pytest.mark.parametrize(
    ("numbers", "silent_seconds"),
    [([1, 2, 3, 4, 5, 6], 0.0), ([1, 2, 3], 3.0), ([1], 5.0)],
)
def test_a_beat_that_is_read_again_is_no_sign_of_life(numbers: list[int], silent_seconds: float) -> None:
    clock: Any = Clock()
    stopped: Any = Rounds(clock, 6)
    store: Any = Store(numbers)
    peers = Peers(0, lambda: Beat(step=3, phase="training"), clock, stopped)
    peers.join([ProcessId("host", 1, 0, 0), ProcessId("host", 2, 0, 0)], patience_seconds=PATIENCE)
    peers.exchange(store)
    peers.join_thread()
    clock.seconds -= 1  # the last wait, after which nothing was read
    assert [peers.silent_seconds(rank) for rank in (0, 1)] == [0.0, silent_seconds]
    failed = [(one.rank, one.reason) for one in peers.failed]
    assert failed == ([(1, "stopped responding for 5 s")] if silent_seconds > PATIENCE else [])
