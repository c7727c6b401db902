"""Where ranks meet before they compute together: all are there within the first step's patience, or the missing are named."""

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
from dist_trainer.distributed.launch_env import RankInfo, launcher_id, rank_info
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import ConfigError, PeerLostError, StoppedError
from dist_trainer.storage.processes import ProcessId, environment_of

STORE_TIMEOUT = timedelta(days=7)
"""Patience of the stores' own calls: who waits for them is watched, or watches itself."""
LOOK_SECONDS = 0.05
STUCK_SECONDS = 1.0
"""So much later than it should have ended, what talks to the store is stuck: rank 0, which keeps it, is the missing one."""
LINGER_SECONDS = 1.0
"""Rank 0, which keeps the store, stays so long after it was found who is missing: the others must read it too. These stay
twice as long, for where one leaves the launcher ends the others, and the one that says why must come first."""
PORT = "DIST_TRAINER_PORT"
"""The variable by which launch files choose the ports of rank 0's two stores, this and the next, which firewalls must let
through. Without it ranks meet at MASTER_PORT, and the second store's port is any."""
PORT_SECONDS = 10.0
"""How long rank 0 waits for a port that is in use: a rank 0 that has just been killed may still hold it."""
_ALL_ARE_HERE, _MISSING = "all are here", "missing"


def rendezvous(info: RankInfo, heartbeat: Heartbeat, stop_request: StopRequest) -> tuple[dist.Store, str | None]:
    """Wait for all ranks, and begin to watch them.

    Returns the store by which process groups are made, and this machine's address as the others see it, where it is known.
    Raises ConfigError where another process uses the port at which ranks meet, or where ranks that should all be on one
    machine are not. Raises PeerLostError where ranks have not come
    within the first step's patience, after it has killed those of them that are on this machine: a stopped process would
    outlive all others. Raises StoppedError where a signal came meanwhile.
    """
    meeting = _Meeting(info, heartbeat)
    # The store's calls can block for ever, by a rank 0 that froze while it answered, and then no signal handler runs.
    thread = threading.Thread(target=meeting.attend, name="meeting", daemon=True)
    thread.start()
    while thread.is_alive() and time.monotonic() < meeting.end + STUCK_SECONDS:
        if stop_request:
            raise StoppedError(stop_request.signal_number)
        thread.join(LOOK_SECONDS)
    if meeting.trouble is not None:
        if info.rank == 0:
            raise meeting.trouble
        raise PeerLostError(f"{_where()}, which rank 0 keeps, cannot be reached: {meeting.trouble}", printed_by=1)
    if not meeting.is_complete:
        _leave_without(meeting.missing or [0], info, heartbeat.patience_seconds())
    if info.local_world_size == info.world_size and len(meeting.hosts) > 1:
        raise ConfigError(
            f"the ranks are on several machines, such as {meeting.hosts[0]} and {meeting.hosts[1]}, but LOCAL_WORLD_SIZE is "
            "not set, or counts all of them; start the ranks with torchrun, or set LOCAL_RANK and LOCAL_WORLD_SIZE for each"
        )
    return meeting.store, meeting.address


class _Meeting:
    """What one rank does in a thread of its own: say that it is here, and read who else is."""

    def __init__(self, info: RankInfo, heartbeat: Heartbeat) -> None:
        self.info, self.heartbeat = info, heartbeat
        self.end = time.monotonic() + heartbeat.patience_seconds()
        self.store: dist.Store
        self.address: str | None = None
        self.hosts: list[str] = []
        self.is_complete = False
        self.missing: list[int] = []
        self.trouble: Exception | None = None

    def attend(self) -> None:
        try:
            self._attend()
        except Exception as error:
            self.trouble = error

    def _attend(self) -> None:
        info, address = self.info, os.environ["MASTER_ADDR"]
        self.store = self._store_of_the_launch(address)
        # Named after the run: another one may have found the same port.
        here = dist.PrefixStore(f"meeting {os.environ.get('TORCHELASTIC_RUN_ID', '')}", self.store)
        heard, port = None, 0
        if info.rank == 0:
            heard = self._keep_store(address, _port() + 1 if PORT in os.environ else 0)
            self.heartbeat.prepare_store(heard, info.world_size)
            port = heard.port
        process = asdict(ProcessId.of(os.getpid()))
        here.set(str(info.rank), json.dumps({"process": process, "port": port, "address": own_address(address)}))
        if here.add("number", 1) == info.world_size:
            here.set(_ALL_ARE_HERE, "")
        while not here.check([_ALL_ARE_HERE]):
            if time.monotonic() > self.end or here.check([_MISSING]):
                missing = [rank for rank in range(info.world_size) if not here.check([str(rank)])]
                # The first one to find it says it for all.
                self.missing = json.loads(here.compare_set(_MISSING, "", json.dumps(missing)))
                return
            time.sleep(LOOK_SECONDS)
        everyone = [json.loads(text) for text in here.multi_get([str(rank) for rank in range(info.world_size)])]
        if heard is None:
            heard = _reach_store(address, everyone[0]["port"])
        self.address = address_among([one["address"] for one in everyone], everyone[info.rank]["address"])
        processes = [ProcessId(**one["process"]) for one in everyone]
        self.hosts = sorted({process.host for process in processes})
        self.heartbeat.watch_peers(processes, heard)
        self.is_complete = True

    def _store_of_the_launch(self, address: str) -> dist.Store:
        """Kept by torchrun where it says so, as for torch's own env://, else by rank 0."""
        if self.info.rank == 0 and not _launcher_keeps_store():
            return self._keep_store(address, _port())
        return _reach_store(address, _port())

    def _keep_store(self, address: str, port: int) -> dist.TCPStore:
        """A store of this process on `port`; on any where that is 0. Raises ConfigError where the port stays in use."""
        end = time.monotonic() + PORT_SECONDS
        while True:
            try:
                return dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=STORE_TIMEOUT)
            except dist.DistNetworkError as error:
                if "EADDRINUSE" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise ConfigError(
                        f"port {port} of this machine, where ranks meet, is in use by another process; choose another "
                        "MASTER_PORT, at least 3 from that of any other run"
                    ) from error
            time.sleep(LOOK_SECONDS)


def _reach_store(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)


def _launcher_keeps_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _port() -> int:
    """At which ranks meet."""
    own = None if _launcher_keeps_store() else os.environ.get(PORT)
    return int(own or os.environ["MASTER_PORT"])


def _leave_without(missing: list[int], info: RankInfo, patience_seconds: float) -> None:
    printed_by = next((rank for rank in range(info.world_size) if rank not in missing), None)
    if info.rank != printed_by:
        time.sleep(2 * LINGER_SECONDS)
    elif info.rank == 0:
        time.sleep(LINGER_SECONDS)
    for pid, environment in _siblings().items():
        if _rank_of(environment, info.world_size) in missing:
            ProcessId.of(pid).kill()
    names = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
    raise PeerLostError(
        f"{names} not come within {patience_seconds:.0f} s (distributed.hang_timeout_minutes) to {_where()}; the run ends "
        "here, start the same command again",
        printed_by=printed_by,
    )


def _where() -> str:
    return f"the place where ranks meet ({os.environ['MASTER_ADDR']}, port {_port()})"


def _rank_of(environment: dict[str, str], world_size: int) -> int | None:
    """The rank that a process was started as; None for one that is no rank of this run."""
    try:
        info = rank_info(environment)
    except ConfigError:
        return None
    return info.rank if info.world_size == world_size and launcher_id(environment) == launcher_id() else None


def _siblings() -> dict[int, dict[str, str]]:
    """The other processes that this one's parent has started, and the environments they began with, as far as can be seen."""
    found: dict[int, dict[str, str]] = {}
    for children in Path(f"/proc/{os.getppid()}/task").glob("*/children"):
        with suppress(OSError):
            for pid in map(int, children.read_text().split()):
                found[pid] = environment_of(pid)
    found.pop(os.getpid(), None)
    return found
