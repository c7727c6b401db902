"""What differs between a replay and its run, or between replays: the first number, the first tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_trainer.run.replay import Line

COMPARED = {"train": ("loss", "grad_norm"), "digest": ("digest",), "validation": ("loss",)}
"""Fields of lines, by kind, in the order in which a step makes them."""
DIGEST = "digest of the weights"
NAMES = {("validation", "loss"): "validation loss", ("digest", "digest"): DIGEST}


@dataclass(frozen=True)
class Difference:
    """A number or digest that differs."""

    step: int
    name: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        """In one line."""
        return f"step {self.step}: {self.name} {self.ours} and {self.theirs}"


def compare(ours: Sequence[Line], theirs: Sequence[Line]) -> tuple[int, Difference | None]:
    """The number of values and digests that both have, and the first that differs."""
    others = {(line["kind"], line["step"]): line for line in theirs if line["kind"] in COMPARED}
    kinds, compared = list(COMPARED), 0
    both = [(line, others[line["kind"], line["step"]]) for line in ours if (line["kind"], line["step"]) in others]
    for line, other in sorted(both, key=lambda pair: (pair[0]["step"], kinds.index(pair[0]["kind"]))):
        for name in COMPARED[line["kind"]]:
            if name not in line or name not in other:
                continue
            compared += 1
            if _bits(line[name]) != _bits(other[name]):
                label = NAMES.get((line["kind"], name), name)
                return compared, Difference(line["step"], label, line[name], other[name])
    return compared, None


def _bits(value: Any) -> str:
    """metrics.jsonl has null for NaN and infinity."""
    if isinstance(value, float):
        return value.hex() if value - value == 0 else "not finite"
    return "not finite" if value is None else str(value)


def first_tensor(ours: Sequence[Line], theirs: Sequence[Line]) -> tuple[int, str] | None:
    """Step and name of the first tensor that differs, by the digests of tensors."""
    others = {line["step"]: line["tensors"] for line in theirs if line["kind"] == "digest"}
    for line in ours:
        if line["kind"] == "digest" and line["step"] in others:
            for name, digest in line["tensors"].items():
                if others[line["step"]].get(name) != digest:
                    return line["step"], name
    return None


def in_words(difference: Difference | None, tensor: tuple[int, str, float | None] | None, *, of: str) -> str:
    """What differs, in order of steps; empty if nothing does. `tensor`: step, name, and the largest difference between its
    elements (None: a second replay did not show it); `of`: what was compared.
    """
    if difference is not None and difference.name == DIGEST and tensor is not None:
        difference = None  # the tensor says it better
    parts = [] if difference is None else [(difference.step, f"{difference} ({of})")]
    if tensor is not None:
        step, name, largest = tensor
        by = "in one replay and not in a second one" if largest is None else f"by up to {largest:.3g}"
        parts.append((step, f"step {step}: weights differ, first {name}, {by}"))
    return "; ".join(text for _, text in sorted(parts))
