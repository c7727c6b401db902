"""What the last bits of a run's losses and weights depend on: the header's line about it, and what resuming changes of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dist_trainer.config.schema import BatchConfig
from dist_trainer.errors import counted
from dist_trainer.parallel.reduction import leaves_of_step, reduction_name
from dist_trainer.parallel.registry import unwrap
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

OF_EARLIER_VERSIONS = "an earlier version's"
LISTED_RANKS = 8
"""More numbers of ranks than these are described, not listed."""


@dataclass(frozen=True)
class Sums:
    """How the gradients of a step are added up."""

    world_size: int
    micro_batch_size: int
    """Sequences."""
    reduction: str | None
    """None: as versions did that had only one way."""

    @classmethod
    def of_checkpoint(cls, metadata: Mapping[str, Any]) -> Sums | None:
        """Of the run that wrote this `metadata` of a checkpoint; None if it does not tell."""
        world_size, batch = metadata.get("world_size"), metadata.get("config", {}).get("batch")
        if not isinstance(world_size, int) or not isinstance(batch, Mapping):
            return None
        # When checkpoints did not tell, null meant a rank's share.
        share = batch.get("global_batch_size", 0) // world_size
        size = metadata.get("micro_batch_size") or batch.get("micro_batch_size") or share
        return cls(world_size, size, metadata.get("reduction")) if size else None

    @classmethod
    def of_trainer(cls, trainer: Trainer) -> Sums:
        """Of the run now."""
        name = reduction_name(trainer.config.distributed.reduction, trainer.model, trainer.world)
        return cls(trainer.world.world_size, trainer.sampler.micro_batch_size, name)


def format_sums(trainer: Trainer) -> str:
    """`exact: the same bits on 1, 2, 4 or 8 ranks`."""
    sums, chosen = Sums.of_trainer(trainer), trainer.config.distributed
    if sums.reduction == "exact":
        return f"exact: {_same_bits(trainer.config.batch, trainer.model, sums)}"
    if sums.reduction != chosen.reduction:
        why = f"{chosen.strategy} exchanges gradients itself (distributed.strategy)"
    else:
        why = "distributed.reduction"
    return f"{sums.reduction}: the last bits may depend on the number of ranks; {why}"


def _same_bits(batch: BatchConfig, model: nn.Module, sums: Sums) -> str:
    size = sums.micro_batch_size
    same = _ranks_with_same_sums(batch, model, sums.world_size)
    with_this_size = _ranks_with_same_sums(_with_size(batch, size), model, sums.world_size)
    more = f"; with --batch.micro_batch_size {size} on {_ranks(with_this_size)}" if same != with_this_size else ""
    return f"the same bits on {_ranks(same)}{more}"


def _ranks_with_same_sums(batch: BatchConfig, model: nn.Module, ranks: int) -> list[int]:
    micro_batches = batch.global_batch_size // batch.sequences_per_micro_batch(ranks)
    leaves = leaves_of_step(model, micro_batches, ranks)
    return [n for n in batch.ranks_with_same_micro_batches(ranks) if leaves_of_step(model, micro_batches, n) == leaves]


def _ranks(numbers: Sequence[int]) -> str:
    """`1, 2, 4 or 8 ranks`, of the divisors of the last one."""
    if len(numbers) > LISTED_RANKS:
        return f"any number of ranks that divides {numbers[-1]}"
    listed = " or ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))
    return f"{listed} rank{'s' if numbers[-1] > 1 else ''}"


def log_changed_sums(trainer: Trainer, metadata: Mapping[str, Any]) -> None:
    """Log in one line whether a run that resumes from a checkpoint with this `metadata` stays on its curve, and if not, why."""
    before, now = Sums.of_checkpoint(metadata), Sums.of_trainer(trainer)
    if before is None or before == now:
        return
    changes = []
    if now.world_size != before.world_size:
        changes.append(f"{counted(now.world_size, 'rank')} (was {before.world_size})")
    if now.micro_batch_size != before.micro_batch_size:
        changes.append(f"micro-batches of {counted(now.micro_batch_size, 'sequence')} (was {before.micro_batch_size})")
    if now.reduction != before.reduction:
        changes.append(f"reduction {now.reduction} (was {before.reduction or OF_EARLIER_VERSIONS})")
    log.log(*_consequence(before, now, trainer), ", ".join(changes))


def _consequence(before: Sums, now: Sums, trainer: Trainer) -> tuple[int, str]:
    """The level and the message, for the changes to be put into."""
    drops_out = any(isinstance(module, nn.Dropout) and module.p > 0 for module in unwrap(trainer.model).modules())
    batch = _with_size(trainer.config.batch, before.micro_batch_size)
    same = _ranks_with_same_sums(batch, trainer.model, before.world_size)
    is_regrouped = now.micro_batch_size != before.micro_batch_size
    if before.reduction is None and not (is_regrouped and drops_out):  # nothing would keep the last bits
        return logging.INFO, "resuming with %s: the last bits of the curve differ from here on (docs/sameness.md)"
    if is_regrouped:
        differ = "sums are rounded differently" + (" and dropout masks differ" if drops_out else "")
        remedy = f"to stay on the same one, set --batch.micro_batch_size {before.micro_batch_size}, on {_ranks(same)}"
        return logging.WARNING, f"resuming with %s: another curve from here on, as {differ}; {remedy} (docs/sameness.md)"
    if now.reduction != before.reduction:
        return logging.WARNING, "resuming with %s: another curve from here on, by its last bits (docs/sameness.md)"
    if now.reduction == "exact" and now.world_size in same:
        return logging.INFO, "resuming with %s: the same curve, to the last bit"
    if now.reduction == "exact":
        bits = f"another curve from here on, by its last bits; it is the same one on {_ranks(same)}"
        return logging.WARNING, f"resuming with %s: {bits} (docs/sameness.md)"
    return logging.INFO, "resuming with %s: the global batches stay the same, the last bits do not"


def _with_size(batch: BatchConfig, sequences: int) -> BatchConfig:
    return replace(batch, micro_batch_size=sequences)
