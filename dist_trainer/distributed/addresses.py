"""The address and network interface through which this machine reaches the others. Its host name is never looked up."""

from __future__ import annotations

import ctypes
import ipaddress
import socket
import sys
from collections.abc import Sequence

_ANY_PORT = 9
"""Nothing is sent to it: connecting a UDP socket only consults the routing table."""
_ADDRESS_IN_SOCKADDR: dict[int, slice] = {socket.AF_INET: slice(4, 8), socket.AF_INET6: slice(8, 24)}
"""Size of Linux's sockaddr_in and sockaddr_in6."""


def own_address(towards: str) -> str | None:
    """The address from which this machine reaches the host `towards`; None if it does not resolve or has no route."""
    try:
        candidates = socket.getaddrinfo(towards, _ANY_PORT, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, kind, protocol, _, address in candidates:
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.connect(address)
                return connection.getsockname()[0].partition("%")[0]
        except OSError:
            continue
    return None


def address_among(addresses: Sequence[str | None], own: str | None) -> str | None:
    """This machine's address as the other machines see it; `addresses` are what all ranks found for themselves.

    Usually `own`. But rank 0's machine looks for a route to itself, and /etc/hosts may map its name to a loopback address
    (127.0.1.1 on Debian). Then the result is its address towards a machine that found a better one.
    """
    if own is not None and not _is_loopback(own):
        return own
    other = next((address for address in addresses if address is not None and not _is_loopback(address)), None)
    return own if other is None else own_address(other)


def interface_of(address: str) -> str | None:
    """Name of the network interface with `address`; None if there is none, or the system is not Linux."""
    if sys.platform != "linux":
        return None
    system = ctypes.CDLL(None)
    first = ctypes.POINTER(_InterfaceAddress)()
    if system.getifaddrs(ctypes.byref(first)) != 0:
        return None
    try:
        entry = first
        while entry:
            if _text_of(entry.contents.address) == address:
                return entry.contents.name.decode()
            entry = entry.contents.next
        return None
    finally:
        system.freeifaddrs(first)


class _InterfaceAddress(ctypes.Structure):
    """The part of `struct ifaddrs` that is read (man getifaddrs)."""


_InterfaceAddress._fields_ = [
    ("next", ctypes.POINTER(_InterfaceAddress)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def _text_of(sockaddr: int | None) -> str | None:
    """The address in the sockaddr at this memory address; None if it is neither IPv4 nor IPv6."""
    if sockaddr is None:
        return None
    family = ctypes.c_ushort.from_address(sockaddr).value
    position = _ADDRESS_IN_SOCKADDR.get(family)
    return None if position is None else socket.inet_ntop(family, ctypes.string_at(sockaddr, position.stop)[position])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
