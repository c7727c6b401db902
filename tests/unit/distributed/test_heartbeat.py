"""What a rank's sign of life does to the process that gives it."""

from __future__ import annotations

import os
import threading
from typing import Any

from dist_trainer.distributed.heartbeat import Beat, Heartbeat, encode_beat
from dist_trainer.distributed.processes import ProcessId


class SlowStore:
    """Its answer comes when `answers` is set."""

    def __init__(self) -> None:
        self.asked, self.answers, self.has_answered = threading.Event(), threading.Event(), False

    def set(self, key: str, value: str) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[str]:
        self.asked.set()
        self.answers.wait(60)
        self.has_answered = True
        return [encode_beat(Beat()) for _ in keys]


def test_a_heartbeat_that_was_stopped_is_no_longer_within_the_store() -> None:
    """There the interpreter's end would abort the process: a finished run would end with SIGABRT."""
    heartbeat, store = Heartbeat(), SlowStore()
    anything: Any = store
    heartbeat.watch_peers([ProcessId.of(os.getpid())], anything)
    assert store.asked.wait(60)
    threading.Timer(0.2, store.answers.set).start()
    heartbeat.stop()
    assert store.has_answered
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
