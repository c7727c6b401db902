"""The sentinel: finds ranks that compute wrong numbers without an error, as some processors and memories do.

Every so many steps, a micro-batch that follows from seed and step is computed by a second rank as well, and the bits of its
loss and gradients, before they are added to others, must be the same. After the step, weights and optimizer state must be the
same on all ranks. The second computation leaves no trace: a run has the same bits with and without a sentinel.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import socket
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dist_trainer.checkpoint.optimizer_state import SEPARATOR, group_values, state_tensors, state_values
from dist_trainer.config.schema import DistributedConfig
from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import broadcast_object, gather_objects
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, RanksDisagreeError
from dist_trainer.parallel.ddp import Buffers, LossDDP
from dist_trainer.parallel.registry import gradient_sync, unwrap
from dist_trainer.training.checksums import Checksums, checksum_of_text, checksums, joined, row_sums
from dist_trainer.training.step import StepResult, seed_dropout, trace_range
from dist_trainer.training.validation import LossFunction

if TYPE_CHECKING:
    from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

TakeStep = Callable[[list[Batch], int], StepResult]
"""`Trainer.train_step`, or what is done around it."""
LOSS, NUMBERS = "the loss", "the optimizer's numbers"


def build_take_step(trainer: Trainer) -> TakeStep:
    """How `trainer` takes its steps: with a sentinel if distributed.sentinel_every_steps says so.

    Raises ConfigError if there is no second rank, or if ranks do not hold complete models.
    """
    distributed = trainer.config.distributed
    if distributed.sentinel_every_steps == 0:
        return lambda micro_batches, target_tokens: trainer.train_step(micro_batches, target_tokens)
    check_has_second_rank(distributed, trainer.world)
    if not isinstance(trainer.model, LossDDP):
        raise ConfigError(
            f"distributed.sentinel_every_steps: {distributed.sentinel_every_steps} needs the strategy ddp, with which a rank "
            "can compute a micro-batch on its own; set distributed.strategy to auto, or distributed.sentinel_every_steps to 0"
        )
    return Sentinel(trainer).take_step


def check_has_second_rank(config: DistributedConfig, world: DistributedContext) -> None:
    """Raises ConfigError if there is a sentinel, but only one rank."""
    if config.sentinel_every_steps > 0 and world.world_size == 1:
        raise ConfigError(
            f"distributed.sentinel_every_steps: {config.sentinel_every_steps} needs a second rank that computes the same, and "
            "this is a single process; start more ranks, or set it to 0"
        )


class Choice(NamedTuple):
    """A micro-batch of a step, and who computes it."""

    number: int
    """In the global batch."""
    owner: int
    """The rank that trains on it."""
    checker: int
    """The rank that computes it as well."""


def choose(seed: int, step: int, *, ranks: int, micro_batches: int, only_first: bool = False) -> Choice:
    """The micro-batch to check in `step`, of `micro_batches` of each rank; `only_first`: one that is its rank's first."""
    key = int.from_bytes(hashlib.blake2b(f"sentinel/{seed}/{step}".encode(), digest_size=8).digest(), "little")
    owner, index = divmod(key % (ranks * micro_batches), micro_batches)
    distance = 1 + (key >> 32) % (ranks - 1)
    return Choice(owner * micro_batches + (0 if only_first else index), owner, (owner + distance) % ranks)


class Watched(NamedTuple):
    """A micro-batch that is being checked."""

    choice: Choice
    batch: Batch
    """On the device."""
    weight: float
    """As in `Trainer.train_step`."""


class ResultsDifferError(Exception):
    """Raised on all ranks before the update, and caught by the sentinel."""


class Sentinel:
    """Takes the steps of one trainer on several ranks."""

    def __init__(self, trainer: Trainer) -> None:
        """Wraps the trainer's loss function, and the context of each of its forward and backward passes."""
        distributed, model = trainer.config.distributed, unwrap(trainer.model)
        self._trainer, self._every = trainer, distributed.sentinel_every_steps
        self._redoes, self._buffers = distributed.on_disagreement == "redo", Buffers(model, trainer.world)
        self._hosts = gather_objects(socket.gethostname(), trainer.world)
        # A rank's later micro-batches begin with buffers that its earlier ones may have changed.
        self._only_first = next(model.buffers(), None) is not None
        self._step_context = trainer.step_context
        trainer.step_context, trainer.loss_function = self._pass, self._recorded(trainer.loss_function)
        self._sums: dict[str, Tensor] | None = None
        """Of the pass that is being recorded: row sums of its loss and gradients."""
        self._watched: Watched | None = None
        self._passes = 0
        """That this rank has begun in the watched step."""
        self._result: Checksums | None = None
        """What this rank has computed of the watched micro-batch, if it is its owner or checker."""
        self._agreed_after: int | None = None
        """The last step after which all ranks had the same state."""

    def take_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """`Trainer.train_step`, checked if that is due. For all ranks; raises RanksDisagreeError on all of them."""
        step = self._trainer.progress.step + 1
        if step % self._every:
            return self._trainer.train_step(micro_batches, target_tokens)
        result = self._checked_step(micro_batches, target_tokens, may_redo=self._redoes)
        self._compare_state(step)
        return result

    def _checked_step(self, micro_batches: list[Batch], target_tokens: int, *, may_redo: bool) -> StepResult:
        restore_buffers = self._buffers.remember()
        try:
            self._watch(micro_batches, target_tokens)
            return self._trainer.train_step(micro_batches, target_tokens)
        except ResultsDifferError:
            restore_buffers()
            error = self._explain()
        finally:
            self._watched = self._result = None
        if not may_redo:
            raise error
        if self._trainer.world.is_main:
            log.warning("%s. The step is repeated (distributed.on_disagreement redo)", error)
        return self._checked_step(micro_batches, target_tokens, may_redo=False)

    def _watch(self, micro_batches: list[Batch], target_tokens: int) -> None:
        """Choose a micro-batch, and compute it on the second rank: now, while there are no gradients that need memory."""
        trainer, world, each = self._trainer, self._trainer.world, len(micro_batches)
        choice = choose(
            trainer.config.seed,
            trainer.progress.step,
            ranks=world.world_size,
            micro_batches=each,
            only_first=self._only_first,
        )
        own = _in_host_memory(micro_batches[choice.number % each]) if world.rank == choice.owner else None
        batch = broadcast_object(own, world, source=choice.owner)
        assert batch is not None, "its owner has sent it"
        self._watched = Watched(choice, batch.to(world.device), trainer.reduction.divisor / max(1, target_tokens))
        if world.rank == choice.checker:
            self._result = self._compute(self._watched)
        self._passes = 0

    def _compute(self, watched: Watched) -> Checksums:
        """The watched micro-batch on this rank alone, as `Trainer.train_step` computes it."""
        trainer = self._trainer
        seed_dropout(trainer.config.seed, trainer.progress.step, block=watched.choice.number)
        alone = gradient_sync(trainer.model, enabled=False)
        with self._step_context(), alone, self._buffers.unchanged(), self._recording() as sums, trace_range("sentinel"):
            trainer.forward_backward(watched.batch, watched.weight, exchanges=False)
        self._clear_gradients()
        return self._in_order(sums)

    @contextmanager
    def _pass(self) -> Generator[None]:
        """Around a forward and backward pass of the trainer, and the exchange of gradients that ends the last one of a step.

        Records the watched micro-batch; after the last one raises ResultsDifferError if the results differ.
        """
        if self._watched is None:
            with self._step_context():
                yield
            return
        index, self._passes = self._passes, self._passes + 1
        world, each, choice = self._trainer.world, self._trainer.accumulation_steps, self._watched.choice
        is_watched = choice.number == world.rank * each + index
        recording: AbstractContextManager[Any] = self._recording() if is_watched else nullcontext()
        with self._step_context(), recording as sums:
            yield
        if is_watched:
            self._result = self._in_order(sums)
        if index == each - 1:
            results = gather_objects(joined(self._result or {}), world)
            if results[choice.owner] != results[choice.checker]:
                raise ResultsDifferError

    @contextmanager
    def _recording(self) -> Generator[dict[str, Tensor]]:
        """Inside, the row sums of one pass's loss and of its gradients, before they are added to others, by name."""
        self._sums = sums = {}
        # Held until the end: torch keeps these nodes only as long as a graph needs them.
        nodes = {name: get_gradient_edge(parameter).node for name, parameter in self._trained_parameters()}
        handles = [node.register_prehook(functools.partial(_record, sums, name)) for name, node in nodes.items()]
        try:
            yield sums
        finally:
            self._sums = None
            for handle in handles:
                handle.remove()

    def _recorded(self, loss_function: LossFunction) -> LossFunction:
        @functools.wraps(loss_function)
        def recorded(model: nn.Module, batch: Any) -> Tensor:
            loss = loss_function(model, batch)
            if self._sums is not None:
                self._sums[LOSS] = row_sums(loss)
            return loss

        return recorded

    def _trained_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in unwrap(self._trainer.model).named_parameters() if p.requires_grad]

    def _in_order(self, sums: dict[str, Tensor]) -> Checksums:
        """In the order of the model's parameters; gradients arrive in about the opposite one."""
        names = [LOSS, *(name for name, _ in self._trained_parameters())]
        return checksums({_gradient_of(name): sums[name] for name in names if name in sums})

    def _clear_gradients(self) -> None:
        self._trainer.optimizer.zero_grad(set_to_none=True)
        for parameter in self._trainer.parameters:
            parameter.grad = None

    # ------------------------------------------------------------------------------------------- who is wrong

    def _explain(self) -> RanksDisagreeError:
        """Why the two results differ: all ranks compute the micro-batch again, and most of them are right. For all ranks.

        Raises RanksDisagreeError if the ranks already had different weights or optimizer states.
        """
        world, watched, step = self._trainer.world, self._watched, self._trainer.progress.step
        assert watched is not None, "its results differ"
        self._compare_state(step)
        choice, again = watched.choice, self._compute(watched)
        results = gather_objects([again] if self._result is None else [self._result, again], world)
        owners, checkers = results[choice.owner][0], results[choice.checker][0]
        right = majority([joined(result) for of_rank in results for result in of_rank])
        wrong = [rank for rank, of_rank in enumerate(results) if any(joined(result) != right for result in of_rank)]
        several = sum(map(len, results))
        verdict = (
            f"none of the {several} results of two and more computations on all ranks has a majority, so either may be wrong"
            if right is None
            else f"most of {several} results agree, and those of {self._named(wrong)} do not"
        )
        return RanksDisagreeError(
            f"step {step + 1}: {self._named([choice.owner, choice.checker])} have computed micro-batch {choice.number} with "
            f"different bits, first in {first_difference(owners, checkers)}; {verdict}. {REMEDY}"
        )

    def _compare_state(self, step: int) -> None:
        """Raises RanksDisagreeError unless all ranks have the same weights and optimizer state after `step`. For all ranks."""
        state, world = self._state(), self._trainer.world
        summaries = gather_objects(joined(state), world)
        if len(set(summaries)) == 1:
            self._agreed_after = step
            return
        states, right = gather_objects(state, world), majority(summaries)
        wrong = [rank for rank, summary in enumerate(summaries) if summary != right]
        other = next(rank for rank, summary in enumerate(summaries) if summary != summaries[wrong[0]])
        differ = f"{self._named(wrong)} {'differ' if len(wrong) > 1 else 'differs'}"
        verdict = f"{differ} from the others" if right else f"{differ} and none has a majority, so any of them may be wrong"
        agreed = "were not compared before" if self._agreed_after is None else f"were equal after step {self._agreed_after}"
        raise RanksDisagreeError(
            f"step {step}: ranks must have the same weights and optimizer state, but {verdict}, first in "
            f"{first_difference(states[wrong[0]], states[other])}; they {agreed}. Checkpoints saved since then may be wrong: "
            f"delete them. {REMEDY}"
        )

    def _state(self) -> Checksums:
        """Of everything that ranks have alike, but for buffers, which are rank 0's after each step."""
        model, optimizer = unwrap(self._trainer.model), self._trainer.optimizer
        tensors = dict[str, Tensor](model.named_parameters())
        for name, tensor in state_tensors(optimizer, model).items():
            tensors[f"the optimizer's {name.replace(SEPARATOR, ' ')}"] = tensor
        numbers = [state_values(optimizer, model), group_values(optimizer), self._trainer.precision.state_dict()]
        sums = checksums({name: row_sums(tensor) for name, tensor in tensors.items()})
        return {**sums, NUMBERS: checksum_of_text(repr(numbers))}

    def _named(self, ranks: Sequence[int]) -> str:
        """`rank 1 (node-7)`, `ranks 0 (node-6) and 1 (node-7)`."""
        names = [f"{rank} ({self._hosts[rank]})" for rank in ranks]
        return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


REMEDY = (
    "Memory or a processor there fails silently: take it out of service, and rerun the same command, which resumes from the "
    "last checkpoint"
)


def majority(values: Sequence[bytes]) -> bytes | None:
    """The value of more than half of `values`, if there is one."""
    [(value, count)] = Counter(values).most_common(1)
    return value if 2 * count > len(values) else None


def first_difference(one: Checksums, other: Checksums) -> str:
    """The name of the first tensor whose checksums differ."""
    return next(name for name in {**one, **other} if one.get(name) != other.get(name))


def _gradient_of(name: str) -> str:
    return name if name == LOSS else f"the gradient of {name}"


def _record(sums: dict[str, Tensor], name: str, gradients: tuple[Tensor | None, ...]) -> None:
    """Called by autograd with the gradient of a parameter in one backward pass, before it is added to earlier ones."""
    for gradient in gradients:
        if gradient is not None:
            sums[name] = row_sums(gradient)


def _in_host_memory(batch: Batch) -> Batch:
    copied = batch.to(torch.device("cpu"))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # copies do not wait
    return copied
