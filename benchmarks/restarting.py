"""From the command to the next step of a run that was saved: ours beside a script that loads what torch.save wrote.

python -m benchmarks.restarting [--size 124m] [--dtype bf16] [--compile] [--rounds 5]

Ours finds the newest good checkpoint, checks each byte of it, and goes on in its folder; the script loads one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.compare import Contestant, header, run, spread
from benchmarks.workloads import SIZES, Workload, prepare

SCRIPT, OURS = "bare script", "ours"


def seconds_to_next_step(workload: Workload, threads: int, *, compiled: bool) -> dict[str, float]:
    """Of each, in turn: a run that saves, and the same run once more, which goes on."""
    flags = "lean,per-block" if compiled else ""
    run(Contestant("bare", (flags,)), workload, threads)
    script = run(Contestant("bare", (f"goes-on,{flags}",)), workload, threads)
    choice = ("--precision.compile", str(compiled).lower())
    run(Contestant("ours", choice), workload, threads)
    longer = ("--train.max_steps", str(2 * workload.total_steps))
    ours = run(Contestant("ours", (*choice, *longer)), workload, threads, goes_on=True)
    return {SCRIPT: script["seconds_to_first_step"], OURS: ours["seconds_to_first_step"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="each block of both, which find compiled code of the run before")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
        size = dataclasses.replace(SIZES[given.size], steps=2)
        workload = Workload(size, Path(folder), dtype=given.dtype, warmup_steps=2, save=True)
        prepare(workload)
        rounds = [seconds_to_next_step(workload, threads, compiled=given.compile) for _ in range(given.rounds + 1)][1:]
    ratios = [seconds[OURS] / seconds[SCRIPT] for seconds in rounds]
    against = "the script with our loss, blocks compiled" if given.compile else "the script"
    print(
        f"{header(workload, given.size, threads)}\n\nFrom the command to the next step, ours against {against}: "
        f"{spread(ratios)} in {len(rounds)} rounds; the script: "
        f"{statistics.median(seconds[SCRIPT] for seconds in rounds):.1f} s."
    )


if __name__ == "__main__":
    main()
