"""Checksums of tensors, computed where the tensors are: to find bits that differ between ranks, not to resist forgery.

A tensor's bytes are 64-bit words in rows of COLUMNS. Words are mixed, each with factors of its column, and added up by rows,
modulo 2^64, so that the sums depend on neither threads nor devices. Any one changed word changes its row's sum: odd factors
and xor with the upper half can be undone. Two changed words of a row cancel with a probability of about 2^-32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

COLUMNS = 4096
ROWS_AT_ONCE = {"cpu": 8, "cuda": 4096}
"""Whose mixed words exist at once: 256 KiB, which a core's cache holds; 128 MiB, by few kernels."""
BYTES_OF_WORD = 8

Checksums = dict[str, bytes]
"""Of tensors, by name."""


def row_sums(tensor: Tensor) -> Tensor:
    """int64 [rows], on the tensor's device, without waiting for it: the sums from which `checksums` follow."""
    words, device = _words(tensor), tensor.device
    first, second = _factors(device)
    whole = len(words) // COLUMNS
    rows = words[: whole * COLUMNS].view(whole, COLUMNS)
    sums = [_mixed(part, first, second).sum(1) for part in rows.split(ROWS_AT_ONCE.get(device.type, whole or 1))]
    rest = words[whole * COLUMNS :]
    return torch.cat([*sums, _mixed(rest, first[: len(rest)], second[: len(rest)]).sum().view(1)])


def checksums(sums: Mapping[str, Tensor]) -> Checksums:
    """8 bytes for the `row_sums` of each tensor. Waits for the device."""
    return {name: _hash([value.cpu().numpy().tobytes()]) for name, value in sums.items()}


def checksum_of_text(text: str) -> bytes:
    """For what is no tensor."""
    return _hash([text.encode()])


def joined(parts: Checksums) -> bytes:
    """One checksum of all `parts`, in their order."""
    return _hash(part for name, value in parts.items() for part in (name.encode(), value))


def _hash(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _words(tensor: Tensor) -> Tensor:
    """The bytes of `tensor` as int64 [words]; zeros fill up the last one."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(data) % BYTES_OF_WORD or data.storage_offset() % BYTES_OF_WORD:
        padded = data.new_zeros(-(-len(data) // BYTES_OF_WORD) * BYTES_OF_WORD)
        padded[: len(data)] = data
        data = padded
    return data.view(torch.int64)


def _mixed(words: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Without the second product, changes of two words' highest bits would cancel whatever the factors."""
    mixed = words * first
    mixed ^= mixed >> 32
    mixed *= second
    return mixed


@cache
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two odd numbers for each column."""
    generator = torch.Generator().manual_seed(0)
    random = torch.empty(2, COLUMNS, dtype=torch.int64).random_(generator=generator)
    first, second = (2 * random + 1).to(device)
    return first, second
