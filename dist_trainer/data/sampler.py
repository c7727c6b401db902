"""Which rank reads which sequence when: one global order, a function of only (seed, position).

The sequences of epoch 0, 1, 2, ... follow one another, each epoch in a different order. Global batch s is the next
global_batch_size sequences. It is divided into blocks of micro_batch_size sequences, and each rank has as many neighbouring
blocks: with n accumulation steps, block j is micro-batch j % n of rank j // n. So neither the number of ranks nor of
accumulation steps changes what a step trains on, and resuming at step s needs nothing but s.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from dist_trainer.config.schema import BatchConfig
from dist_trainer.errors import ConfigError

SEQUENCES_AT_ONCE = 2048
"""Sequences whose place in the order is computed at once, in half a millisecond; fewer would cost more each."""
VALIDATION_SEQUENCES = 8
"""Largest micro-batch of validation if batch.micro_batch_size is not set; without gradients few sequences are enough."""
_ROUNDS = 6


def sequences_per_micro_batch(batch: BatchConfig, world_size: int) -> int:
    """Sequences per forward pass of a rank. Raises ConfigError if ranks and micro-batches do not divide the global batch."""
    if batch.micro_batch_size is None:
        if batch.global_batch_size % world_size:
            raise ConfigError(
                f"batch.global_batch_size ({batch.global_batch_size}) must be a multiple of the number of ranks ({world_size})"
            )
        return batch.sequences_per_micro_batch(world_size)
    per_pass = batch.micro_batch_size * world_size
    if batch.global_batch_size % per_pass:
        raise ConfigError(
            f"batch.global_batch_size ({batch.global_batch_size}) must be a multiple of batch.micro_batch_size x ranks "
            f"({batch.micro_batch_size} x {world_size} = {per_pass} sequences)"
        )
    return batch.micro_batch_size


def sequences_per_validation_block(batch: BatchConfig) -> int:
    """Sequences per forward pass of validation: the same on any number of ranks, so that its sum is too."""
    return batch.micro_batch_size or min(batch.global_batch_size, VALIDATION_SEQUENCES)


def accumulation_steps(batch: BatchConfig, world_size: int) -> int:
    """Micro-batches of a rank per optimizer step. Raises ConfigError if the global batch is not divisible."""
    return batch.global_batch_size // (sequences_per_micro_batch(batch, world_size) * world_size)


class FeistelPermutation:
    """A random permutation of 0..size-1 that needs no memory: a Feistel network over the next even number of bits, repeated
    until the result is below size (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, size: int, key: tuple[int, int]) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The permuted `positions`; int64 in, int64 out."""
        values = self._encrypt(positions.astype(np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class GlobalOrderSampler(DistributedSampler):
    """This rank's sequences in the global order: those of one epoch, or without end from the step given to `seek`.

    An epoch's sequences are those of the global batches that begin in it.
    """

    def __init__(self, dataset: Dataset, *, batch: BatchConfig, rank: int, world_size: int, seed: int) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self.num_sequences = len(dataset)  # type: ignore[arg-type]
        self.batch = batch
        self.micro_batch_size = sequences_per_micro_batch(batch, world_size)
        self._start_step: int | None = None

    @property
    def steps_per_epoch(self) -> float:
        """Global batches in one pass over the data."""
        return self.num_sequences / self.batch.global_batch_size

    def epoch_of(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.batch.global_batch_size / self.num_sequences  # rounded once: complete epochs give integers

    def seek(self, step: int) -> None:
        """Iterate from global batch number `step` on, without end; until the next `set_epoch`."""
        self._start_step = step

    def set_epoch(self, epoch: int) -> None:
        """Iterate over epoch number `epoch` only."""
        super().set_epoch(epoch)
        self._start_step = None

    def _steps_of_epoch(self) -> range:
        first, end = (-(-epoch * self.num_sequences // self.batch.global_batch_size) for epoch in (self.epoch, self.epoch + 1))
        return range(first, end)

    def __len__(self) -> int:
        """Sequences of this rank in the current epoch."""
        return len(self._steps_of_epoch()) * self.batch.global_batch_size // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        steps = self._steps_of_epoch() if self._start_step is None else range(self._start_step, sys.maxsize)
        at_once = max(1, SEQUENCES_AT_ONCE * self.num_replicas // self.batch.global_batch_size)
        for first in steps[::at_once]:
            yield from self._sequences_of_steps(first, min(at_once, steps.stop - first)).tolist()

    def _sequences_of_steps(self, first: int, count: int) -> np.ndarray:
        """Sequences of this rank for `count` steps, in the order in which it reads them."""
        micro = self.micro_batch_size
        per_step = self.batch.global_batch_size // (micro * self.num_replicas)
        steps = np.arange(first, first + count, dtype=np.int64)
        blocks = self.rank * per_step + np.arange(per_step, dtype=np.int64)
        starts = (steps[:, None] * self.batch.global_batch_size + blocks * micro).reshape(-1, 1)
        return self.sequences_at((starts + np.arange(micro, dtype=np.int64)).reshape(-1))

    def sequences_at(self, positions: np.ndarray) -> np.ndarray:
        """The sequences at `positions` of the endless global order."""
        epochs, within = np.divmod(positions, self.num_sequences)
        sequences = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            sequences[here] = FeistelPermutation(self.num_sequences, (self.seed, int(epoch)))(within[here])
        return sequences


class ValidationSampler(DistributedSampler):
    """This rank's blocks of micro_batch_size sequences: block b is rank b % world_size's. Each sequence is read once."""

    def __init__(
        self, dataset: Dataset, *, micro_batch_size: int, rank: int, world_size: int, max_sequences: int | None
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        available = len(dataset)  # type: ignore[arg-type]
        self.num_sequences = available if max_sequences is None else min(available, max_sequences)
        self.micro_batch_size = micro_batch_size
        self.num_blocks = -(-self.num_sequences // micro_batch_size)
        """Over all ranks."""

    def __iter__(self) -> Iterator[int]:
        for block in range(self.rank, self.num_blocks, self.num_replicas):
            first = block * self.micro_batch_size
            yield from range(first, min(first + self.micro_batch_size, self.num_sequences))

    def __len__(self) -> int:
        return sum(1 for _ in self)
