"""The rendezvous: all ranks join within the first step's timeout, before they compute together, or missing ranks are named."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dist_trainer.distributed.addresses import address_among, own_address
from dist_trainer.distributed.heartbeat import Heartbeat
from dist_trainer.distributed.launch_env import Endpoint, RankInfo, launcher_id, rank_info, rendezvous_endpoint
from dist_trainer.distributed.peers import fill_store
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import ConfigError, PeerLostError, StoppedError
from dist_trainer.storage.processes import ProcessId, environment_of

STORE_TIMEOUT = timedelta(days=7)
"""Timeout of the stores' calls: the threads that make them are watched, or check the time themselves."""
POLL_SECONDS = 0.05
STUCK_SECONDS = 1.0
"""A thread that exceeds its time limit by this much is stuck in the store: rank 0, which hosts it, is the missing rank."""
LINGER_SECONDS = 1.0
"""Rank 0, which hosts the store, stays this long after finding that ranks are missing, so that the others can read which. The
others stay twice as long: once a rank exits, the launcher ends all, and the rank that prints must exit first."""
PORT_SECONDS = 10.0
"""How long rank 0 waits for a port that is in use: a rank 0 that has just been killed may still hold it."""
_ALL_JOINED, _ALL_READ, _MISSING = "all joined", "all read", "missing"


def rendezvous(info: RankInfo, heartbeat: Heartbeat, stop_request: StopRequest) -> tuple[dist.Store, str | None]:
    """Wait for all ranks, and start to watch them.

    Returns the store for creating process groups, and this machine's address as the others see it, if known. Raises
    ConfigError if another process uses the rendezvous port, or if ranks that should be on one machine are not; StoppedError if
    a signal arrives meanwhile; PeerLostError if ranks have not joined within the first step's timeout. Missing ranks on this
    machine are killed first: a process suspended by SIGSTOP would outlive all others.
    """
    attempt = _Rendezvous(info, heartbeat)
    # The store's calls can block forever, if rank 0 freezes while answering, and then no signal handler runs.
    thread = threading.Thread(target=attempt.run, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < attempt.end + STUCK_SECONDS:
        if stop_request:
            raise StoppedError(stop_request.signal_number)
        thread.join(POLL_SECONDS)
    if attempt.error is not None:
        if info.rank == 0:
            raise attempt.error
        raise PeerLostError(
            f"the rendezvous store on rank 0 ({attempt.endpoint}) is unreachable: {attempt.error}", printed_by=1
        ) from attempt.error
    if not attempt.is_complete:
        _leave_without(attempt.missing or [0], info, attempt.endpoint, heartbeat.patience_seconds())
    if info.local_world_size == info.world_size and len(attempt.hosts) > 1:
        raise ConfigError(
            f"the ranks are on several machines, such as {attempt.hosts[0]} and {attempt.hosts[1]}, but LOCAL_WORLD_SIZE is "
            "not set, or counts all of them; start the ranks with torchrun, or set LOCAL_RANK and LOCAL_WORLD_SIZE for each"
        )
    return attempt.store, attempt.address


class _Rendezvous:
    """One rank's part, run in a separate thread: report that this rank has joined, and read which others have."""

    def __init__(self, info: RankInfo, heartbeat: Heartbeat) -> None:
        self.info, self.heartbeat, self.endpoint = info, heartbeat, rendezvous_endpoint()
        self.end = time.monotonic() + heartbeat.patience_seconds()
        self.store: dist.Store
        self.address: str | None = None
        self.hosts: list[str] = []
        self.is_complete = False
        self.missing: list[int] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._join()
        except Exception as error:
            self.error = error

    def _join(self) -> None:
        info, address = self.info, self.endpoint.address
        self.store = self._launch_store()
        # Keys contain the run's id: another run may use the same port.
        joined = dist.PrefixStore(f"rendezvous {self.endpoint.run_id}", self.store)
        heartbeat_store, port = None, 0
        if info.rank == 0:
            heartbeat_store = self._open_store(self.endpoint.heartbeat_port)
            fill_store(heartbeat_store, info.world_size, patience_seconds=self.heartbeat.patience_seconds())
            port = heartbeat_store.port
        process = asdict(ProcessId.of(os.getpid()))
        joined.set(str(info.rank), json.dumps({"process": process, "port": port, "address": own_address(address)}))
        if joined.add("number", 1) == info.world_size:
            joined.set(_ALL_JOINED, "")
        while not joined.check([_ALL_JOINED]):
            if time.monotonic() > self.end or joined.check([_MISSING]):
                missing = [rank for rank in range(info.world_size) if not joined.check([str(rank)])]
                # The first rank to notice decides for all.
                self.missing = json.loads(joined.compare_set(_MISSING, "", json.dumps(missing)))
                return
            time.sleep(POLL_SECONDS)
        ranks = [json.loads(text) for text in joined.multi_get([str(rank) for rank in range(info.world_size)])]
        if heartbeat_store is None:
            heartbeat_store = _connect(address, ranks[0]["port"])
        self.address = address_among([rank["address"] for rank in ranks], ranks[info.rank]["address"])
        self._wait_for_readers(joined)
        processes = [ProcessId(**rank["process"]) for rank in ranks]
        self.hosts = sorted({process.host for process in processes})
        self.heartbeat.watch_peers(processes, heartbeat_store)
        self.is_complete = True

    def _wait_for_readers(self, joined: dist.Store) -> None:
        """Rank 0, which may own the store, must not leave before all have read it, even if what it read is an error."""
        if joined.add("readers", 1) == self.info.world_size:
            joined.set(_ALL_READ, "")
        while self.info.rank == 0 and not joined.check([_ALL_READ]) and time.monotonic() < self.end:
            time.sleep(POLL_SECONDS)

    def _launch_store(self) -> dist.Store:
        if self.info.rank == 0 and not self.endpoint.launcher_keeps_store:
            return self._open_store(self.endpoint.port)
        return _connect(self.endpoint.address, self.endpoint.port)

    def _open_store(self, port: int) -> dist.TCPStore:
        """A store of this process on `port` (0: any). Raises ConfigError if the port stays in use."""
        end = time.monotonic() + PORT_SECONDS
        while True:
            try:
                return dist.TCPStore(self.endpoint.address, port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
            except dist.DistNetworkError as error:
                if "EADDRINUSE" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise ConfigError(
                        f"port {port} of this machine, which the ranks need for their rendezvous, is in use by another "
                        "process; choose another MASTER_PORT, at least 3 away from any other run's"
                    ) from error
            time.sleep(POLL_SECONDS)


def _connect(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)


def _leave_without(missing: list[int], info: RankInfo, endpoint: Endpoint, patience_seconds: float) -> None:
    printed_by = next((rank for rank in range(info.world_size) if rank not in missing), None)
    if info.rank != printed_by:
        time.sleep(2 * LINGER_SECONDS)
    elif info.rank == 0:
        time.sleep(LINGER_SECONDS)
    for pid, environment in _siblings().items():
        if _rank_of(environment, info.world_size) in missing:
            ProcessId.of(pid).kill()
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
    raise PeerLostError(
        f"{ranks} did not join the rendezvous at {endpoint} within {patience_seconds:.0f} s "
        "(distributed.hang_timeout_minutes); rerun the same command",
        printed_by=printed_by,
    )


def _siblings() -> dict[int, dict[str, str]]:
    """The other children of this process's parent, with the environments they were started with, as far as visible."""
    siblings: dict[int, dict[str, str]] = {}
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        with suppress(OSError):
            for pid in map(int, children.read_text().split()):
                siblings[pid] = environment_of(pid)
    siblings.pop(os.getpid(), None)
    return siblings


def _rank_of(environment: dict[str, str], world_size: int) -> int | None:
    """The rank that a process was started as; None if it is not a rank of this run."""
    try:
        info = rank_info(environment)
    except ConfigError:
        return None
    return info.rank if info.world_size == world_size and launcher_id(environment) == launcher_id() else None
