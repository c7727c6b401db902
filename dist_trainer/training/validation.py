"""Validation loss over all ranks: each sequence once, weighted by tokens; it does not depend on the number of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_trainer.config.schema import ValidationConfig
from dist_trainer.data.batch import Batch
from dist_trainer.data.token_bytes import TokenBytes
from dist_trainer.distributed.collectives import all_reduce_sum
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.training.precision import Precision

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Sum of the token losses of a batch: float32 scalar."""
LESS_THAN_A_SEQUENCE = 2**-20
"""As a fraction of a step, as no global batch has 2^20 sequences; far more than rounding errors of floats."""


@dataclass(frozen=True)
class ValidationResult:
    """What a validation measured."""

    loss: float
    """Nats per target token."""
    tokens: int
    """Target tokens it was measured on."""
    bytes: int | None
    """Of the UTF-8 text that these tokens encode; None if the tokenizer has no byte counts."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """loss * tokens / ln 2 / bytes; None if bytes are 0 or unknown.

        Defined by The Pile (Gao et al. 2020, https://arxiv.org/abs/2101.00027, section 3.1: L_T / L_B * log2(e^loss) for text
        of L_T tokens and L_B bytes); comparable across tokenizers. Loss and bytes are of the same tokens, those trained on. Not
        counted: a text's first token if nothing precedes it, prompts, padding, and text truncated at the end of a sequence.
        End-of-text and other tokens without text count in the loss only, because encoding where a text ends takes bits too.
        (lm-eval's bits_per_byte counts each text's first token, but not its end.)
        """
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def metrics(self) -> dict[str, float | int | None]:
        """The measurements by their names in metrics.jsonl and in the output of `evaluate`."""
        measures = {"loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return {**measures, "tokens": self.tokens, "bytes": self.bytes}


def validation_is_due(config: ValidationConfig, step: int, *, max_steps: int, epoch_of: Callable[[int], float]) -> bool:
    """Whether a validation follows `step`: every so many steps or epochs, and always after the last step.

    `epoch_of(step)`: passes over the training data after `step` steps.
    """
    by_steps = config.every_steps > 0 and step % config.every_steps == 0
    by_epochs = config.every_epochs > 0 and _parts_done(config, step, epoch_of) > _parts_done(config, step - 1, epoch_of)
    return step > 0 and (by_steps or by_epochs or step >= max_steps)


def _parts_done(config: ValidationConfig, step: int, epoch_of: Callable[[int], float]) -> int:
    """How many times `every_epochs` has passed after `step` steps, to within a sequence.

    Floats are inexact (0.3 // 0.1 is 2), so an interval that ends less than a sequence after the step counts as passed.
    """
    less_than_a_sequence = epoch_of(1) * LESS_THAN_A_SEQUENCE
    return math.floor((epoch_of(step) + less_than_a_sequence) / config.every_epochs)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_blocks: int,
    world: DistributedContext,
    precision: Precision,
    loss_function: LossFunction,
    token_bytes: TokenBytes | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> ValidationResult | None:
    """Validation loss on `batches` of `model`, which is in evaluation mode, and not wrapped by a strategy. For all ranks.

    `batches` are this rank's blocks of sequences: block i of this rank is block `rank + i * world_size` of `num_blocks`.
    Losses are kept by block and summed exactly (math.fsum), so the sum depends neither on the number of ranks nor on which rank
    computed what. `token_bytes` are those of the batches' tokenizer, if it has such a table. Returns None on all ranks if one
    of them was `interrupted`.
    """
    started = time.perf_counter()
    losses = torch.zeros(num_blocks, dtype=torch.float64, device=world.device)
    target_tokens, text_bytes, cut_short = 0, 0, False
    for index, batch in enumerate(batches):
        world.heartbeat.mark("validating")
        if cut_short := interrupted():
            break
        target_tokens += batch.num_targets()
        text_bytes += 0 if token_bytes is None else token_bytes.count(batch)
        with precision.autocast():
            losses[world.rank + index * world.world_size] = loss_function(model, batch.to(world.device))

    # Other ranks' blocks are exact zeros here, so summing only collects them.
    counts = torch.tensor([target_tokens, text_bytes, int(cut_short)], dtype=torch.float64, device=world.device)
    with world.heartbeat.waiting("summing losses"):
        *block_losses, all_targets, all_bytes, ranks_cut_short = all_reduce_sum(torch.cat([losses, counts]), world).tolist()
    if ranks_cut_short:
        return None
    loss = math.fsum(block_losses) / max(1, int(all_targets))
    known_bytes = None if token_bytes is None else int(all_bytes)
    return ValidationResult(loss, int(all_targets), known_bytes, time.perf_counter() - started)
