"""The garbage collector runs when it is told to, and is as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from dist_trainer.training.garbage_collection import ALL_EVERY, MIDDLE_EVERY, GarbageCollector


class Cycle:
    """Freed by the collector alone."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector_as_before() -> Iterator[None]:
    gc.unfreeze()  # what all tests have imported
    enabled = gc.isenabled()
    yield
    assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, 0)
    gc.freeze()


def many_objects() -> list[object]:
    """Enough to start an automatic collection, of all generations."""
    return [[] for _ in range(2 * gc.get_threshold()[0] * gc.get_threshold()[1] * max(1, gc.get_threshold()[2]))]


def test_nothing_is_collected_between_the_calls() -> None:
    with GarbageCollector() as garbage:
        garbage.collect()
        cycle = weakref.ref(Cycle())
        kept = many_objects()
        assert cycle() is not None, f"{len(kept)} objects later"
        garbage.collect()
        assert cycle() is None


@pytest.mark.parametrize(("survived", "every"), [(1, MIDDLE_EVERY), (MIDDLE_EVERY, ALL_EVERY)])
def test_what_grows_old_is_collected_now_and_then(survived: int, every: int) -> None:
    with GarbageCollector() as garbage:
        cycle = Cycle()
        for _ in range(survived):
            garbage.collect()
        old = weakref.ref(cycle)
        del cycle
        for _ in range(survived, every - 1):
            garbage.collect()
        assert old() is not None
        garbage.collect()
        assert old() is None


def test_it_runs_by_itself_between_steps() -> None:
    with GarbageCollector() as garbage:
        garbage.collect()
        assert not gc.isenabled()
        with garbage.automatic():
            assert gc.isenabled()
        assert not gc.isenabled()


def test_the_first_collection_of_everything_looks_at_what_was_there_before_and_later_ones_no_more() -> None:
    cycle = Cycle()
    gc.collect()  # it grows old
    before = weakref.ref(cycle)
    del cycle
    with pytest.raises(KeyError), GarbageCollector() as garbage:  # noqa: PT012
        for _ in range(ALL_EVERY - 1):
            garbage.collect()
        assert before() is not None
        garbage.collect()
        assert before() is None
        assert gc.get_freeze_count() > 0
        raise KeyError


def test_a_collector_that_the_user_has_disabled_stays_so() -> None:
    gc.disable()
    try:
        cycle = weakref.ref(Cycle())
        with GarbageCollector() as garbage:
            garbage.collect()
            with garbage.automatic():
                assert not gc.isenabled()
        assert cycle() is not None
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.collect()


def test_outside_of_training_nothing_changes() -> None:
    garbage = GarbageCollector()
    garbage.collect()
    assert gc.isenabled()
