"""Before ranks compute together all must have joined: the missing ones are named, and no rank waits for hours."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed import context as world
from dist_trainer.distributed import rendezvous
from dist_trainer.distributed.context import init_distributed
from dist_trainer.distributed.launch_env import PORT
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import ConfigError, PeerLostError, StoppedError
from tests.distributed.ranks import run_ranks

SECONDS = 1.5
SHORT = DistributedConfig(hang_timeout_minutes=SECONDS / 60)
STAYS_AWAY = "stays away"


def join_or_report(*, without: int):
    """What a rank learns about the one that does not join: the message, which rank prints it, and after how many seconds."""
    if int(os.environ["RANK"]) == without:
        return STAYS_AWAY
    began = time.monotonic()
    try:
        with init_distributed(SHORT):
            return "all joined"
    except PeerLostError as error:
        return str(error), error.printed_by, time.monotonic() - began


@pytest.mark.parametrize(("without", "printed_by"), [(0, 1), (1, 0), (2, 0)])
def test_a_rank_that_does_not_join_is_named_after_the_first_steps_patience(without, printed_by):
    found = run_ranks(3, lambda: join_or_report(without=without))
    assert found.pop(without) == STAYS_AWAY
    for message, printing_rank, seconds in found:
        assert message.startswith(f"rank {without} did not join the rendezvous at 127.0.0.1:")
        assert "within 2 s (distributed.hang_timeout_minutes)" in message
        assert printing_rank == printed_by, "one rank prints it"
        assert SECONDS - 0.1 < seconds < SECONDS + 10


def test_ranks_on_several_machines_whose_launcher_does_not_say_so_are_rejected(monkeypatch):
    """Some set RANK and WORLD_SIZE alone, as Kubeflow's PyTorchJob does: all ranks would look for each other on loopback."""

    def join():
        own = f"pod-{os.environ['RANK']}"
        monkeypatch.setattr(socket, "gethostname", lambda: own)
        del os.environ["LOCAL_WORLD_SIZE"]
        with pytest.raises(ConfigError) as refusal, init_distributed(SHORT):
            pass
        return str(refusal.value)

    for refusal in run_ranks(2, join):
        assert refusal.startswith("the ranks are on several machines, such as pod-0 and pod-1, but LOCAL_WORLD_SIZE is not set")


def test_ranks_that_have_joined_wait_for_each_other_for_longer():
    """The timeout of the rendezvous does not apply afterwards: the heartbeat knows which waits are legitimate."""

    def wait():
        with init_distributed(SHORT) as world:
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
                with init_distributed(DistributedConfig(hang_timeout_minutes=1), stop_request=stop_request):
                    return "all joined"
            except StoppedError:
                return time.monotonic() - began

    assert run_ranks(2, wait)[0] < 10


def free_ports(number):
    """The first of so many consecutive ports that are free."""
    for first in range(21000, 32000, number):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + number):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return first
    raise AssertionError("no free ports")


def test_rank_0_keeps_its_stores_at_the_ports_that_launch_files_document(monkeypatch):
    """MASTER_PORT is what torchrun says, which it chooses by chance."""
    first = free_ports(2)
    monkeypatch.setenv(PORT, str(first))

    def listening():
        with init_distributed(SHORT) as world:
            local = {line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:] if " 0A " in line}
            local |= {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line}
            dist.barrier(world.cpu_group)
            return {int(address.rpartition(":")[2], 16) for address in local}

    for ports in run_ranks(2, listening):
        assert {first, first + 1} <= ports


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere gloo chooses")
def test_gloo_takes_the_interface_that_leads_to_the_other_machines_unless_the_user_chose_one(monkeypatch):
    def interface():
        os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if on two machines, that reach each other at MASTER_ADDR
        monkeypatch.setattr(world, "interface_of", lambda address: {"127.0.0.1": "lo"}[address])
        with init_distributed(SHORT):
            return os.environ["GLOO_SOCKET_IFNAME"]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert run_ranks(2, interface) == ["lo", "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "=lo")  # which gloo would not find
    with pytest.raises(AssertionError, match="=lo"):
        run_ranks(2, interface)


@pytest.mark.parametrize("taken", [0, 1])
def test_a_port_that_stays_in_use_is_rejected_in_a_sentence_and_one_that_becomes_free_is_waited_for(taken, monkeypatch):
    first = free_ports(2)
    monkeypatch.setenv(PORT, str(first))
    monkeypatch.setattr(rendezvous, "PORT_SECONDS", 0.3)

    def join():
        if os.environ["RANK"] == "1":
            return STAYS_AWAY
        with pytest.raises(ConfigError) as refusal, init_distributed(SHORT):
            pass
        return str(refusal.value)

    with socket.create_server(("0.0.0.0", first + taken)):
        found = run_ranks(2, join)
    assert f"port {first + taken} of this machine, which the ranks need for their rendezvous, is in use" in found[0]

    other = socket.create_server(("0.0.0.0", first + taken))

    def wait():
        if os.environ["RANK"] == "1":
            other.close()
        else:
            threading.Timer(0.2, other.close).start()
        with init_distributed(DistributedConfig(hang_timeout_minutes=1)):
            return "all joined"

    monkeypatch.setattr(rendezvous, "PORT_SECONDS", 30.0)
    with other:
        threading.Timer(0.2, other.close).start()
        assert run_ranks(2, wait) == ["all joined"] * 2
