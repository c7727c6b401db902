"""A machine's address as the others see it, and the network interface that has it."""

import socket
import sys

import pytest

from dist_trainer.distributed import addresses
from dist_trainer.distributed.addresses import address_among, interface_of, own_address

LOOPBACK, DEBIAN_S, EIGHT, NINE = "127.0.0.1", "127.0.1.1", "10.0.0.8", "10.0.0.9"


def test_an_address_is_that_of_the_way_to_the_other_machine():
    assert own_address("127.0.0.1") == LOOPBACK
    assert own_address("no-such-machine.invalid") is None
    assert own_address("a" * 70) is None, "a name that no host can have"


@pytest.mark.parametrize(
    ("found", "own", "address"),
    [
        ([EIGHT, NINE], NINE, NINE),
        ([EIGHT, NINE], EIGHT, EIGHT),
        ([DEBIAN_S, NINE], DEBIAN_S, f"towards {NINE}"),  # the machine of rank 0, by its own name
        ([DEBIAN_S, None, NINE], None, f"towards {NINE}"),
        ([LOOPBACK, LOOPBACK], LOOPBACK, LOOPBACK),  # all on one machine
        ([None, None], None, None),
    ],
)
def test_an_address_that_the_others_cannot_reach_is_replaced_by_the_one_towards_them(found, own, address, monkeypatch):
    monkeypatch.setattr(addresses, "own_address", lambda other: f"towards {other}")
    assert address_among(found, own) == address


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's structures")
def test_an_interface_is_found_by_its_address():
    assert interface_of(LOOPBACK) == "lo"
    if socket.has_ipv6 and own_address("::1") == "::1":
        assert interface_of("::1") == "lo"
    assert interface_of("192.0.2.77") is None, "an address of nobody"
    assert interface_of("unknown") is None
