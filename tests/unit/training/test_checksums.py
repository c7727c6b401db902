"""Checksums see every changed bit, whatever a tensor's format, size and place in memory."""

import itertools

import pytest
import torch

from dist_trainer.training.checksums import COLUMNS, checksums, joined, row_sums


def checksum(tensor):
    return checksums({"tensor": row_sums(tensor)})["tensor"]


def random_bits(dtype, size):
    bits = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 2 * COLUMNS, 3 * 8 * COLUMNS + 5])
def test_any_one_flipped_bit_is_seen(dtype, size):
    tensor = random_bits(dtype, size)
    before, data = checksum(tensor), tensor.view(torch.uint8)
    for place in {0, len(data) // 2, len(data) - 1}:
        for bit in (1, 128):
            data[place] ^= bit
            assert checksum(tensor) != before
            data[place] ^= bit
    assert checksum(tensor) == before


def test_two_flipped_bits_of_a_row_do_not_cancel():
    words = random_bits(torch.int64, 64)
    seen = {checksum(words)}
    flips = [(place, 1 << bit) for place in range(8) for bit in (0, 31, 32, 62)] + [(place, -(1 << 63)) for place in range(8)]
    for (one, bits), (other, more) in itertools.combinations(flips, 2):
        changed = words.clone()
        changed[one] ^= bits
        changed[other] ^= more
        seen.add(checksum(changed))
    assert len(seen) == 1 + len(flips) * (len(flips) - 1) // 2


def test_only_the_bits_count_not_their_place_in_memory_or_the_threads():
    whole = random_bits(torch.float32, 9 * COLUMNS)
    part = whole[1 : 1 + 8 * COLUMNS]
    expected = checksum(part.clone())
    assert checksum(part) == expected
    assert checksum(part.view(8, COLUMNS).T.contiguous().T) == expected
    assert checksum(torch.nn.Parameter(part)) == expected
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(()).int()[None][:0])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert checksum(part) == expected
    torch.set_num_threads(threads)


def test_names_count():
    assert joined({"one": b"1", "two": b"2"}) != joined({"one": b"1", "2": b"2"})
