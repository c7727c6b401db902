"""What the exchange of gradients costs a step, and how much of it the backward pass hides, read from a trace."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]
"""Begin and end, in microseconds."""

STEP_RANGE = re.compile(r"step \d+")
_EXCHANGE = re.compile(r"reduce|gather", re.IGNORECASE)
"""Of the collectives' names: not DDP's broadcast when it sorts its buckets."""
_LAUNCHES = ("cuda_runtime", "cuda_driver")


@dataclass(frozen=True)
class ExchangeCost:
    """Per step, on one rank."""

    comm_ms: float
    """Time in which an exchange is under way, waiting for ranks that come later included."""
    comm_exposed_ms: float
    """The part of it in which this rank computes nothing."""


def exchange_cost(events: Iterable[Mapping[str, Any]]) -> ExchangeCost | None:
    """The cost of the exchange in a Chrome trace's `events`, on average over its steps; None where it holds no step.

    comm_ms is the length of the union of all reductions and gatherings that are begun inside a step's range, and
    comm_exposed_ms of what remains of that union outside of all computing. On a GPU both are kernels: NCCL's, by the range
    in which they were launched, and all others. On CPU an exchange lasts from the call until gloo's thread
    has the result, and computing is a node of the backward pass or any operator on this rank's own threads, less the time in
    which these hand a bucket over to gloo. Cores that gloo's threads take from computing make the step longer and are not
    counted.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [_interval(event) for event in spans if _category(event) == "user_annotation" and _is_step(event)]
    if not steps:
        return None
    on_gpu = any(_category(event) == "kernel" for event in spans)
    exchanging, computing = _on_gpu(spans, steps) if on_gpu else _on_cpu(spans, steps)
    exposed = subtract(exchanging, computing)
    return ExchangeCost(_length(exchanging) / 1000 / len(steps), _length(exposed) / 1000 / len(steps))


def _on_gpu(spans: list[Mapping[str, Any]], steps: list[Interval]) -> tuple[list[Interval], list[Interval]]:
    launched = {_correlation(event): event["ts"] for event in spans if _category(event) in _LAUNCHES}
    exchanging, computing = [], []
    for event in spans:
        if _category(event) != "kernel":
            continue
        if "nccl" not in event["name"].lower():
            computing.append(_interval(event))
        elif _EXCHANGE.search(event["name"]) and _lies_in(launched.get(_correlation(event), event["ts"]), steps):
            exchanging.append(_interval(event))
    return union(exchanging), union(computing)


def _on_cpu(spans: list[Mapping[str, Any]], steps: list[Interval]) -> tuple[list[Interval], list[Interval]]:
    exchanging, computing, handing_over = [], [], []
    for event in spans:
        name, interval = event["name"], _interval(event)
        if _category(event) == "user_annotation":
            if name.startswith("gloo:") and _EXCHANGE.search(name) and _lies_in(interval[0], steps):
                exchanging.append(interval)
        elif _category(event) == "cpu_op":
            (handing_over if name.startswith("c10d::") else computing).append(interval)
    return union(exchanging), subtract(union(computing), union(handing_over))


# ------------------------------------------------------------------------------------------------ intervals


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def subtract(minuend: list[Interval], subtrahend: list[Interval]) -> list[Interval]:
    """The moments of `minuend` that are not in `subtrahend`; all are unions."""
    return list(_subtract(minuend, subtrahend))


def _subtract(minuend: list[Interval], subtrahend: list[Interval]) -> Iterator[Interval]:
    first = 0
    for begin, end in minuend:
        while first < len(subtrahend) and subtrahend[first][1] <= begin:
            first += 1
        for cut_begin, cut_end in subtrahend[first:]:
            if cut_begin >= end:
                break
            if cut_begin > begin:
                yield begin, cut_begin
            begin = max(begin, cut_end)
        if begin < end:
            yield begin, end


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


def _lies_in(moment: float, intervals: list[Interval]) -> bool:
    return any(begin <= moment <= end for begin, end in intervals)


def _interval(event: Mapping[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _is_step(event: Mapping[str, Any]) -> bool:
    return STEP_RANGE.fullmatch(event["name"]) is not None


def _category(event: Mapping[str, Any]) -> str:
    return event.get("cat", "")


def _correlation(event: Mapping[str, Any]) -> Any:
    return event.get("args", {}).get("correlation")
