"""Exchanges the ranks' beats, and what rank 0 concludes from them, over a TCPStore that rank 0 keeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from dist_trainer.distributed.beats import (
    Beat,
    decode_beat,
    decode_failed_ranks,
    encode_beat,
    encode_failed_ranks,
    find_failed_ranks,
)
from dist_trainer.distributed.peers import Peers

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.2
"""Between two beats of a rank, for up to RANKS_READ_AT_ONCE ranks; rank 0 reads all of them, so more ranks send less often."""
RANKS_READ_AT_ONCE = 64
STOPPING_SECONDS = 5.0
FAILED_RANKS_KEY = "failed ranks"


class Messenger:
    """The thread that sends this rank's beats and reads what others sent: rank 0 all beats, the others rank 0's beat and what
    rank 0 found. It ends if the store cannot be reached.
    """

    def __init__(self, rank: int, peers: Peers, own_beat: Callable[[], Beat], stopped: threading.Event) -> None:
        self.last_sent = Beat()
        """The last beat of this rank that the others can know."""
        self._rank, self._peers, self._own_beat, self._stopped = rank, peers, own_beat, stopped
        self._thread: threading.Thread | None = None

    def start(self, store: dist.Store) -> None:
        """Begin to exchange beats with all `peers`."""
        self._thread = threading.Thread(target=self._exchange, args=(store,), name="heartbeat", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread: if it is inside the store's C++ code when the interpreter ends, that aborts the process."""
        if self._thread is not None:
            self._thread.join(STOPPING_SECONDS)

    def _exchange(self, store: dist.Store) -> None:
        num_ranks = len(self._peers.processes)
        senders = range(num_ranks) if self._rank == 0 else (0,)
        pause_seconds = BEAT_SECONDS * max(1.0, num_ranks / RANKS_READ_AT_ONCE)
        try:
            while not self._stopped.wait(pause_seconds):
                self._send(store)
                for rank, text in zip(senders, store.multi_get([beat_key(rank) for rank in senders]), strict=True):
                    self._peers.receive(rank, decode_beat(text))
                self._share_failed_ranks(store)
        except (dist.DistError, RuntimeError) as error:
            log.debug("the heartbeat's store on rank 0 is unreachable: %s", error)

    def _send(self, store: dist.Store) -> None:
        beat = replace(self._own_beat(), gone=tuple(self._peers.gone_since), number=self.last_sent.number + 1)
        store.set(beat_key(self._rank), encode_beat(beat))
        self.last_sent = beat

    def _share_failed_ranks(self, store: dist.Store) -> None:
        peers = self._peers
        if peers.hanging():
            return  # they are the cause: ranks that are gone by now have left because of them
        if self._rank == 0:
            peers.failed = find_failed_ranks(list(peers.beats.values()), [peers.silent_seconds(rank) for rank in peers.beats])
            store.set(FAILED_RANKS_KEY, encode_failed_ranks(peers.failed))
        else:
            peers.failed = decode_failed_ranks(store.get(FAILED_RANKS_KEY))
        for failed in peers.failed:
            if failed.is_gone:
                peers.mark_gone(failed.rank)


def beat_key(rank: int) -> str:
    """The store's key for the beats of `rank`."""
    return f"beat/{rank}"


def fill_store(store: dist.Store, num_ranks: int, *, patience_seconds: float) -> None:
    """On rank 0: create all keys, so that no rank waits for one that was not sent yet."""
    for rank in range(num_ranks):
        store.set(beat_key(rank), encode_beat(Beat(patience_seconds=patience_seconds)))
    store.set(FAILED_RANKS_KEY, encode_failed_ranks([]))
