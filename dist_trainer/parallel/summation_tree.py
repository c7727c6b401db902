"""The fixed tree by which the gradients of a global batch's micro-batches are added, whichever ranks compute them.

A tree over `leaves` micro-batches: the left child of a node has the largest power of two of its leaves that is not all of them,
as in a Merkle tree (RFC 6962, section 2.1). Floating-point sums depend on their order; in this order they depend on the
micro-batches alone. A leaf is one micro-batch, or several neighbours that are added in order. A node is named by its leaves:
[start, stop).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple, Generic[T]):
    """The sum of the leaves [start, stop)."""

    start: int
    stop: int
    value: T


def number_of_leaves(micro_batches: int, ranks: int, *, at_most: int) -> int:
    """Into how many leaves of equal size the `micro_batches` of a step are divided, `at_most` so many.

    It depends on the number of ranks only if they cannot share these leaves out equally: then there are more.
    """
    divisors = [leaves for leaves in range(1, micro_batches + 1) if micro_batches % leaves == 0]
    leaves = max(leaves for leaves in divisors if leaves <= at_most)
    return leaves if leaves % ranks == 0 else min(more for more in divisors if more >= leaves and more % ranks == 0)


def is_node(start: int, stop: int, leaves: int) -> bool:
    """Whether the tree has a node of exactly the leaves [start, stop)."""
    return [(start, stop)] == largest_nodes(start, stop, leaves)


def largest_nodes(start: int, stop: int, leaves: int) -> list[tuple[int, int]]:
    """The fewest nodes that make up the leaves [start, stop), in order."""

    def within(low: int, high: int) -> list[tuple[int, int]]:
        if stop <= low or high <= start:
            return []
        if start <= low and high <= stop:
            return [(low, high)]
        middle = low + _left_leaves(high - low)
        return within(low, middle) + within(middle, high)

    return within(0, leaves)


def _left_leaves(leaves: int) -> int:
    return 1 << ((leaves - 1).bit_length() - 1)


def push(stack: list[Node[T]], node: Node[T], leaves: int, add: Callable[[T, T], T]) -> None:
    """Append the `node` that follows the last one of `stack`, and add neighbours as long as their sum is a node of the tree.

    As a binary counter carries: for n leaves in order the stack never has more than log2(n) + 1 nodes.
    """
    stack.append(node)
    while len(stack) > 1 and is_node(stack[-2].start, stack[-1].stop, leaves):
        right, left = stack.pop(), stack.pop()
        stack.append(Node(left.start, right.stop, add(left.value, right.value)))
