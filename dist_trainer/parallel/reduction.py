"""`REDUCTIONS`: how the gradients of a step's micro-batches are added up, on each rank and between ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from dist_trainer.config.registry import build
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.exchange import Exchange, build_exchanges
from dist_trainer.parallel.ddp import LossDDP
from dist_trainer.parallel.determinism import operations_without_deterministic_kernels_named, use_deterministic_kernels
from dist_trainer.parallel.registry import first_sync_differs, gradient_sync
from dist_trainer.parallel.summation_tree import Node, largest_nodes, number_of_leaves, push

Gradients = dict[Tensor, Tensor]
"""By parameter; one on which no loss depends has none."""
LARGE_MODEL = 2**28
"""Parameters: 1 GiB of gradients."""
LEAVES_OF_LARGE_MODELS = 32
"""One process then keeps up to log2(32) sums, each as large as the gradients; each of 8 ranks keeps 2, of 32 ranks none."""


@runtime_checkable
class Reduction(Protocol):
    """Adds up the gradients of a step's micro-batches, of all ranks."""

    divisor: int
    """What the sum is divided by."""
    gradient_copies: int
    """Copies of the gradients that a rank keeps at most, in addition to the parameters' `grad`."""
    first_differs: bool
    """Whether the first step would add in another order than later ones."""

    def micro_batch(self, index: int) -> AbstractContextManager[None]:
        """The context of the forward and backward pass of this rank's micro-batch `index` of a step."""
        ...


def leaves_of_step(model: nn.Module, micro_batches: int, ranks: int) -> int:
    """The leaves of the tree of exact sums, for `micro_batches` of a step over all ranks."""
    is_large = sum(parameter.numel() for parameter in model.parameters()) > LARGE_MODEL
    return number_of_leaves(micro_batches, ranks, at_most=LEAVES_OF_LARGE_MODELS if is_large else micro_batches)


class FastReduction:
    """Each rank adds up its own gradients, and the strategy averages them over the ranks: the last bits depend on the ranks."""

    gradient_copies = 0

    def __init__(self, model: nn.Module, world: DistributedContext, micro_batches: int) -> None:
        """`micro_batches`: of each rank in a step."""
        self.divisor = world.world_size
        self.first_differs = first_sync_differs(model, world)
        self._model, self._last = model, micro_batches - 1
        if isinstance(model, LossDDP):
            model.average_buckets()  # another trainer may have summed exactly

    def micro_batch(self, index: int) -> AbstractContextManager[None]:
        """See Reduction."""
        return gradient_sync(self._model, enabled=index == self._last)


class ExactReduction:
    """Gradients are added in the order of one tree over a step's micro-batches: the same bits on any number of ranks.

    Each rank computes neighbouring leaves of the tree. autograd adds a leaf's micro-batches in the parameters' `grad`, and a
    pair of leaves if each is one micro-batch. Other sums wait until that of their neighbour is complete.
    """

    divisor, first_differs = 1, False

    def __init__(self, model: nn.Module, world: DistributedContext, micro_batches: int) -> None:
        """`model`: of a single process, or wrapped by `ddp`; `micro_batches`: of each rank in a step. For all ranks."""
        self._model, self._num_leaves = model, leaves_of_step(model, world.world_size * micro_batches, world.world_size)
        each = self._num_leaves // world.world_size
        self._leaves, self._per_leaf = range(world.rank * each, (world.rank + 1) * each), micro_batches // each
        # A sum waits at each level of the rank's part of the tree, but for pairs that autograd adds.
        self.gradient_copies = max(0, (each - 1).bit_length() - (self._per_leaf == 1))
        self._parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums: list[Node[Gradients]] = []
        self._stream: torch.cuda.Stream | None = None
        if world.device.type == "cuda":
            use_deterministic_kernels()
            self._stream = torch.cuda.Stream(world.device)
        if isinstance(model, LossDDP):
            self._tree = TreeAllReduce(world, self._num_leaves)
            model.reduce_buckets_with(self._reduce_bucket)

    @contextmanager
    def micro_batch(self, index: int) -> Generator[None]:
        """See Reduction. Raises ConfigError if an operation has no deterministic kernel on a GPU."""
        leaf, completes_leaf = self._leaves[index // self._per_leaf], (index + 1) % self._per_leaf == 0
        is_last = completes_leaf and leaf == self._leaves[-1]
        if index == 0:
            self._sums.clear()  # an error may have ended the step before
        if is_last and isinstance(self._model, LossDDP) and self._model.find_unused_parameters:
            self._begin_at_zero()
        with gradient_sync(self._model, enabled=is_last), operations_without_deterministic_kernels_named():
            yield
        if is_last and isinstance(self._model, LossDDP):
            self._sums.clear()
        elif is_last or (completes_leaf and not self._is_first_of_pair(leaf)):
            push(self._sums, Node(self._start(leaf), leaf + 1, self._take_gradients()), self._num_leaves, _add)
        if is_last and self._sums:
            for parameter, gradient in self._sums.pop().value.items():
                parameter.grad = gradient

    def _is_first_of_pair(self, leaf: int) -> bool:
        return self._per_leaf == 1 and leaf % 2 == 0

    def _start(self, leaf: int) -> int:
        """The first leaf in the parameters' `grad` when `leaf` is complete."""
        return leaf - 1 if leaf > self._leaves.start and self._is_first_of_pair(leaf - 1) else leaf

    def _begin_at_zero(self) -> None:
        """DDP expects a gradient of each parameter that an earlier micro-batch has used."""
        for parameter in {parameter for node in self._sums for parameter in node.value}:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _take_gradients(self) -> Gradients:
        gradients: Gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        for parameter in self._parameters:
            parameter.grad = None
        return gradients

    def _reduce_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """DDP's communication hook: the sums that wait, and the last leaves' in the bucket, over all ranks."""
        nodes: list[Node[Tensor]] = []
        for start, stop, gradients in self._sums:
            push(nodes, Node(start, stop, _flat(bucket, gradients)), self._num_leaves, Tensor.add_)
        last = self._leaves[-1]
        push(nodes, Node(self._start(last), last + 1, bucket.buffer()), self._num_leaves, Tensor.add_)
        with self._during_backward(nodes):
            self._tree.sum(nodes, out=bucket.buffer())
            future: Future[Tensor] = Future(devices=None if self._stream is None else [self._stream.device])
            future.set_result(bucket.buffer())
        return future

    @contextmanager
    def _during_backward(self, nodes: list[Node[Tensor]]) -> Generator[None]:
        """On GPUs, a stream of its own, so that the backward pass goes on meanwhile."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for node in nodes:
                node.value.record_stream(self._stream)
            yield


def _add(left: Gradients, right: Gradients) -> Gradients:
    """Their sum, in the memory of `left`."""
    for parameter, gradient in right.items():
        left[parameter] = left[parameter].add_(gradient) if parameter in left else gradient
    return left


def _flat(bucket: dist.GradBucket, gradients: Gradients) -> Tensor:
    """The gradients of the bucket's parameters as its buffer has them, zeros where there are none; removed from `gradients`."""
    buffer = bucket.buffer()
    flat = torch.zeros_like(buffer)
    for parameter, place in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if parameter in gradients:
            begin = place.storage_offset() - buffer.storage_offset()
            # DDP lays a gradient out by its parameter's strides, such as channels_last, unless they leave gaps.
            last = sum((size - 1) * stride for size, stride in zip(parameter.size(), parameter.stride(), strict=True))
            strides = parameter.stride() if last + 1 == parameter.numel() else place.stride()
            flat.as_strided(place.size(), strides, begin).copy_(gradients.pop(parameter))
    return flat


class TreeAllReduce:
    """Sums over all ranks, each of which has some nodes of the tree."""

    def __init__(self, world: DistributedContext, leaves: int) -> None:
        """For all ranks."""
        self._leaves = leaves
        self._levels: list[tuple[Exchange, list[list[tuple[int, int]]]]] = []
        """Groups of ranks, from those of a machine to all, and the nodes that each of the group's ranks brings."""
        width = leaves // world.world_size
        for exchange in build_exchanges(world):
            ranks = dist.get_world_size(exchange.group)
            begin = world.rank * (leaves // world.world_size) // (ranks * width) * (ranks * width)
            spans = [largest_nodes(start, start + width, leaves) for start in range(begin, begin + ranks * width, width)]
            self._levels.append((exchange, spans))
            width *= ranks

    def sum(self, nodes: list[Node[Tensor]], *, out: Tensor, level: int = 0) -> None:
        """Write to `out` the sum over all ranks of their `nodes`, flat tensors of its size."""
        exchange, spans = self._levels[level]
        shards = exchange.scatter([node.value for node in nodes], [len(of_rank) for of_rank in spans])
        sums: list[Node[Tensor]] = []
        for of_rank, shards_of_rank in zip(spans, shards, strict=True):
            for (start, stop), shard in zip(of_rank, shards_of_rank, strict=True):
                push(sums, Node(start, stop, shard), self._leaves, torch.add)
        if level + 1 < len(self._levels):
            total = torch.empty_like(sums[0].value)
            self.sum(sums, out=total, level=level + 1)
        else:
            [(_, _, total)] = sums
        exchange.gather(total, out)


REDUCTIONS: dict[str, Callable[[nn.Module, DistributedContext, int], Reduction]] = {
    "exact": ExactReduction,
    "fast": FastReduction,
}


def build_reduction(name: str, model: nn.Module, world: DistributedContext, *, micro_batches: int) -> Reduction:
    """The reduction `name` of `model`'s gradients, for `micro_batches` of each rank in a step. For all ranks."""
    chosen = reduction_name(name, model, world)
    return build(REDUCTIONS, chosen, "distributed.reduction", model, world, micro_batches, kind=Reduction)


def reduction_name(name: str, model: nn.Module, world: DistributedContext) -> str:
    """What `name` means for `model`: a strategy of the user's own exchanges gradients itself, so nothing is exact then."""
    return "fast" if name == "exact" and world.world_size > 1 and not isinstance(model, LossDDP) else name
