"""Which ranks have failed when nothing moves: those that are behind the others, and none that is merely slow."""

from __future__ import annotations

import pytest

from dist_trainer.distributed.beats import UNLIMITED, Beat, FailedRank, Phase, decode_beat, encode_beat, find_failed_ranks

PATIENCE = 120.0
LONG = 2 * PATIENCE


def beat(phase: Phase, *, idle: float = LONG, step: int = 6, longest_step: float = 1.0, **more: object) -> Beat:
    return Beat(step, phase, idle, PATIENCE, longest_step, **more)  # type: ignore[arg-type]


def blamed(*beats: Beat, silent: tuple[float, ...] | None = None) -> list[int]:
    return [failed.rank for failed in find_failed_ranks(beats, silent or (0.0,) * len(beats))]


@pytest.mark.parametrize(
    ("behind", "waiting"),
    [
        ("reading data", "waiting for others"),
        ("training", "backward"),
        ("training", "updating"),
        ("validating", "summing losses"),
        ("sampling", "waiting for others"),
        ("warming up", "waiting for others"),
        ("backward", "waiting for others"),
        ("logging", "waiting for others"),
    ],
)
def test_the_rank_that_lags_is_to_blame_and_not_those_that_wait_for_it(behind: Phase, waiting: Phase) -> None:
    assert blamed(beat(waiting), beat(behind), beat(waiting)) == [1]
    assert find_failed_ranks([beat(behind), beat(waiting)], [0, 0]) == [
        FailedRank(0, "made no progress for 240 s", beat(behind))
    ]


@pytest.mark.parametrize("phase", ["warming up", "reading data", "training", "backward", "logging", "validating"])
def test_ranks_that_are_slow_all_together_never_hang(phase: Phase) -> None:
    assert blamed(*[beat(phase, idle=1e9)] * 3) == []


def test_ranks_that_all_wait_for_one_another_hang() -> None:
    assert blamed(beat("waiting for others"), beat("waiting for others")) == [0, 1]


@pytest.mark.parametrize("phase", sorted(UNLIMITED))
def test_nobody_is_to_blame_while_one_prepares_or_saves(phase: Phase) -> None:
    assert blamed(beat(phase, idle=1e9), beat("training")) == []


def test_patience_is_ten_times_the_longest_step_or_the_timeout_if_that_is_more() -> None:
    for longest_step, patience in ((1.0, PATIENCE), (60.0, 600.0)):
        behind, waiting = (
            [beat(phase, idle=patience + extra, longest_step=longest_step) for extra in (-1.0, 1.0)]
            for phase in ("training", "backward")
        )
        assert blamed(behind[0], waiting[1]) == []
        assert blamed(behind[1], waiting[0]) == []
        assert blamed(behind[1], waiting[1]) == [0]


def test_a_silent_rank_is_named_after_the_timeout_however_long_steps_are() -> None:
    beats = [beat("training", longest_step=3600.0), beat("training", longest_step=3600.0)]
    assert blamed(*beats, silent=(0.0, PATIENCE - 1)) == []
    assert find_failed_ranks(beats, [0.0, PATIENCE + 1]) == [FailedRank(1, "stopped responding for 121 s", beats[1])]


def test_a_rank_that_died_comes_before_all_others() -> None:
    assert blamed(beat("training"), beat("backward", gone=(2,)), beat("training"), silent=(0.0, LONG, 0.0)) == [2]


def test_a_beat_is_received_as_it_was_sent() -> None:
    sent = beat("saving", gone=(1, 3), number=7)
    assert decode_beat(encode_beat(sent)) == sent
