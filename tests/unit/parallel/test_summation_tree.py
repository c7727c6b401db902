"""Sums as text: every order of addition is another text."""

import math

import pytest

from dist_trainer.parallel.summation_tree import Node, is_node, largest_nodes, number_of_leaves, push


def tree(start: int, stop: int) -> str:
    """RFC 6962's tree over the leaves [start, stop)."""
    if stop - start == 1:
        return str(start)
    middle = start + 2 ** math.ceil(math.log2(stop - start) - 1)
    return f"({tree(start, middle)}+{tree(middle, stop)})"


def add(left: str, right: str) -> str:
    return f"({left}+{right})"


def summed(nodes: list[Node[str]], leaves: int) -> list[Node[str]]:
    stack: list[Node[str]] = []
    for node in nodes:
        push(stack, node, leaves, add)
    return stack


@pytest.mark.parametrize("leaves", [*range(1, 26), 96])
def test_the_sum_over_any_number_of_ranks_machine_by_machine_is_the_tree_s(leaves):
    for ranks in (ranks for ranks in range(1, leaves + 1) if leaves % ranks == 0):
        each = leaves // ranks
        of_ranks = []
        for first in range(0, leaves, each):
            nodes = summed([Node(leaf, leaf + 1, str(leaf)) for leaf in range(first, first + each)], leaves)
            assert [(start, stop) for start, stop, _ in nodes] == largest_nodes(first, first + each, leaves)
            of_ranks.append(nodes)
        for ranks_of_machine in (size for size in range(1, ranks + 1) if ranks % size == 0):
            machines = [of_ranks[first : first + ranks_of_machine] for first in range(0, ranks, ranks_of_machine)]
            of_machines = [summed([node for nodes in machine for node in nodes], leaves) for machine in machines]
            [total] = summed([node for nodes in of_machines for node in nodes], leaves)
            assert total == Node(0, leaves, tree(0, leaves))


@pytest.mark.parametrize("leaves", [1, 7, 8, 100, 127])
def test_few_sums_wait_at_a_time(leaves):
    stack: list[Node[str]] = []
    for leaf in range(leaves):
        push(stack, Node(leaf, leaf + 1, ""), leaves, add)
        assert len(stack) <= math.log2(leaves) + 1


@pytest.mark.parametrize(
    ("micro_batches", "ranks", "leaves"),
    [
        *((12, ranks, 12) for ranks in (1, 2, 3, 4, 6, 12)),
        *((512, ranks, 32) for ranks in (1, 8, 32)),
        (512, 64, 64),  # more ranks than leaves
        (96, 3, 48),  # 32 leaves cannot be shared out to 3 ranks
        (37, 1, 1),  # a prime above the limit: all are added in order
        (37, 37, 37),
    ],
)
def test_a_step_has_as_many_leaves_as_micro_batches_up_to_a_limit(micro_batches, ranks, leaves):
    assert number_of_leaves(micro_batches, ranks, at_most=32) == leaves


def test_nodes_of_a_tree_over_six_leaves():
    assert [is_node(*node, 6) for node in ((0, 6), (0, 4), (4, 6), (0, 2), (2, 4), (5, 6))] == [True] * 6
    assert [is_node(*node, 6) for node in ((2, 6), (1, 3), (3, 5), (0, 3), (4, 7), (0, 8))] == [False] * 6
