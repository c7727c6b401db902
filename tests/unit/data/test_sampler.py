import numpy as np
import pytest

from dist_trainer.config.schema import BatchConfig
from dist_trainer.data.sampler import (
    FeistelPermutation,
    GlobalOrderSampler,
    ValidationSampler,
    accumulation_steps,
    sequences_per_micro_batch,
)
from dist_trainer.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 4097])
def test_a_keyed_permutation_has_every_position_once(size):
    order = FeistelPermutation(size, (3, 1))(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


def test_other_keys_give_other_orders_that_are_not_nearly_sorted():
    one, two = (FeistelPermutation(1000, (0, epoch))(np.arange(1000)) for epoch in (0, 1))
    assert (one != two).mean() > 0.99
    assert abs(np.corrcoef(np.arange(1000), one)[0, 1]) < 0.1


def global_batches(*, world_size: int, micro: int, steps: int, first: int = 0, rows: int = 37, seed: int = 5):
    """The set of rows of each step, by reading all ranks' samplers."""
    batch = BatchConfig(global_batch_size=16, micro_batch_size=micro)
    share = 16 // world_size
    batches = [[] for _ in range(steps)]
    for rank in range(world_size):
        sampler = GlobalOrderSampler(range(rows), batch=batch, rank=rank, world_size=world_size, seed=seed)
        sampler.seek(first)
        stream = iter(sampler)
        for step in range(steps):
            batches[step].append([next(stream) for _ in range(share)])
    return batches


@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (1, 4), (2, 8), (2, 2), (4, 4), (4, 1), (8, 2)])
def test_each_step_reads_the_same_sequences_on_any_number_of_ranks_and_accumulation_steps(world_size, micro):
    expected = [sorted(ranks[0]) for ranks in global_batches(world_size=1, micro=16, steps=80)]
    found = global_batches(world_size=world_size, micro=micro, steps=80)
    assert [sorted(row for rank in ranks for row in rank) for ranks in found] == expected


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_has_neighbouring_blocks_of_a_global_batch_as_its_micro_batches(world_size):
    """Dropout masks belong to blocks: their micro-batches must hold the same sequences on any number of ranks."""
    [[whole]] = global_batches(world_size=1, micro=16, steps=1)
    [ranks] = global_batches(world_size=world_size, micro=2, steps=1)
    micro_batches = [[rank[start : start + 2] for start in range(0, len(rank), 2)] for rank in ranks]
    assert [block for rank in micro_batches for block in rank] == [whole[2 * j : 2 * j + 2] for j in range(8)]
    assert [len(rank) for rank in micro_batches] == [8 // world_size] * world_size


def test_one_epoch_reads_every_sequence_exactly_once_and_the_next_in_another_order():
    sampler = GlobalOrderSampler(range(37), batch=BatchConfig(16, 8), rank=0, world_size=1, seed=0)
    first, second = sampler.sequences_at(np.arange(37)), sampler.sequences_at(np.arange(37, 74))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(37))
    assert first.tolist() != second.tolist()


def test_seeking_continues_with_exactly_the_next_global_batch():
    whole = global_batches(world_size=2, micro=2, steps=50)
    assert global_batches(world_size=2, micro=2, steps=17, first=33) == whole[33:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_iterating_gives_one_epoch_as_of_any_sampler(world_size):
    samplers = [
        GlobalOrderSampler(range(40), batch=BatchConfig(16, 8), rank=rank, world_size=world_size, seed=0)
        for rank in range(world_size)
    ]
    epochs = []
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        epochs.append([list(sampler) for sampler in samplers])
        assert [len(rows) for rows in epochs[-1]] == [len(sampler) for sampler in samplers]
    assert [sum(map(len, epoch)) for epoch in epochs] == [48, 32, 48, 32]  # 2.5 global batches of 16 rows, in turn 3 and 2
    for rank, sampler in enumerate(samplers):
        sampler.seek(0)
        endless = iter(sampler)
        assert [next(endless) for epoch in epochs for _ in epoch[rank]] == [row for epoch in epochs for row in epoch[rank]]


def test_epochs_count_sequences():
    sampler = GlobalOrderSampler(range(40), batch=BatchConfig(16, 8), rank=0, world_size=1, seed=0)
    assert sampler.steps_per_epoch == 2.5
    assert sampler.epoch_of(5) == 2.0


def test_another_seed_gives_another_order():
    one, two = (global_batches(world_size=1, micro=16, steps=2, seed=seed) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 40])
def test_validation_reads_every_sequence_once_over_all_ranks(world_size, rows):
    samplers = [
        ValidationSampler(range(rows), micro_batch_size=4, rank=rank, world_size=world_size, max_sequences=None)
        for rank in range(world_size)
    ]
    assert sorted(row for sampler in samplers for row in sampler) == list(range(rows))
    assert sum(map(len, samplers)) == rows


def test_validation_can_be_limited_to_some_sequences_the_same_on_any_number_of_ranks():
    def rows(world_size: int) -> list[int]:
        samplers = [
            ValidationSampler(range(40), micro_batch_size=4, rank=rank, world_size=world_size, max_sequences=12)
            for rank in range(world_size)
        ]
        return sorted(row for sampler in samplers for row in sampler)

    assert rows(1) == rows(2) == rows(4) == list(range(12))


def test_a_global_batch_that_does_not_divide_is_rejected_with_both_numbers():
    assert accumulation_steps(BatchConfig(16, 2), 4) == 2
    with pytest.raises(ConfigError, match=r"\(16\).*3 x 4 = 12"):
        accumulation_steps(BatchConfig(16, 3), 4)


@pytest.mark.parametrize(
    ("global_batch_size", "ranks", "expected"),
    [
        *((16, ranks, 2) for ranks in (1, 2, 4, 8)),  # an eighth: the same curve
        (16, 16, 1),  # more ranks than eighths
        (24, 3, 8),  # eighths cannot be shared out to three ranks
        *((12, ranks, 3) for ranks in (1, 2, 4)),  # 8 does not divide 12, but 4 does
        (7, 1, 7),
    ],
)
def test_without_a_micro_batch_size_it_does_not_depend_on_the_number_of_ranks_if_it_can(global_batch_size, ranks, expected):
    assert sequences_per_micro_batch(BatchConfig(global_batch_size), ranks) == expected


def test_a_global_batch_without_equal_shares_is_rejected():
    with pytest.raises(ConfigError, match=r"\(16\) must be a multiple of the number of ranks \(3\)"):
        sequences_per_micro_batch(BatchConfig(16), 3)
