"""A trainer's overhead per step: its steps alternate with those of a bare loop, in one process.

python -m benchmarks.own_cost [--dtype fp32] [--rounds 5] [--only 'ours; HF Trainer']

The bare loop has our loss (at this size the same operations as F.cross_entropy), is not compiled, and runs in the
contestant's process, hence with its allocator's settings. Two processes run one after the other differ by
more than a trainer's overhead, because of other load on the machine; two consecutive steps do not. Printed are the median over
a run's pairs of steps and, for work that is not done in every step, their mean without the lowest and highest hundredth.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.compare import BASE, CONTESTANTS, chosen, header, run, spread
from benchmarks.workloads import SIZES, Workload, prepare
from dist_trainer.distributed.machine import usable_cpus

SIZE = "overhead"
TRAINERS = "bare, lean; ours; HF Trainer; Lightning"
"""The bare loop itself tells what this cannot tell apart."""


def differences(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Median and trimmed mean of contestant minus bare loop, in seconds."""
    more = sorted(own - bare for own, bare in pairs)
    cut = len(more) // 100
    return statistics.median(more), statistics.fmean(more[cut : len(more) - cut])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps that are timed, instead of the size's own number")
    parser.add_argument("--only", default=TRAINERS, help=f"with semicolons between (default: {TRAINERS})")
    arguments = parser.parse_args()
    size = dataclasses.replace(SIZES[SIZE], steps=arguments.steps) if arguments.steps else SIZES[SIZE]
    threads = usable_cpus()
    try:
        names = [name for name in chosen(arguments.only) if name != BASE]
    except ValueError as error:
        parser.error(str(error))
    if not names or any("compiled" in name or "Llama" in name for name in names):
        parser.error(f"--only: some of {TRAINERS}; compiled ones and other models do not do the bare loop's work")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    bare: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
        workload = Workload(size, Path(folder), dtype=arguments.dtype, in_turn=True)
        prepare(workload)
        for number in range(arguments.rounds):
            for name in names:
                pairs = run(CONTESTANTS[name], workload, threads)["in_turn"]
                found[name].append(differences(pairs))
                bare[name].append(statistics.median(seconds for _, seconds in pairs) * 1000)
                print(f"round {number + 1}, {name}: {found[name][-1][0] * 1000:+.3f} ms a step", file=sys.stderr, flush=True)
    print(header(workload, SIZE, threads))
    print("\n| contestant | ms a step more than the bare loop | mean | the bare loop, ms |\n|---|---|---|---|")
    for name, rounds in found.items():
        medians, means = ([value * 1000 for value in values] for values in zip(*rounds, strict=True))
        print(f"| {name} | {spread(medians, sign='+')} | {spread(means, sign='+')} | {statistics.median(bare[name]):.2f} |")
    print(f"\nMedian (smallest to largest) of {arguments.rounds} rounds.")


if __name__ == "__main__":
    main()
