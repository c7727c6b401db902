"""Time from the command to the next step of a saved run: ours compared with a script that loads a torch.save file.

python -m benchmarks.restarting [--size 124m] [--dtype bf16] [--compile] [--rounds 5]

Ours finds the newest valid checkpoint, verifies its checksums and resumes in its folder; the script loads one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from benchmarks.compare import BASE, CONTESTANTS, OURS, header, run, spread
from benchmarks.workloads import SIZES, Workload, prepare
from dist_trainer.distributed.machine import usable_cpus

SCRIPT = "bare script"


def seconds_to_next_step(workload: Workload, threads: int, *, compiled: bool) -> dict[str, float]:
    """For each, in turn: a run that saves, and the same run again, which resumes."""
    script = CONTESTANTS["bare, per block, lean" if compiled else BASE]
    run(script, workload, threads)
    script = dataclasses.replace(script, arguments=(",".join(["resumes", *script.arguments]),))
    found = {SCRIPT: run(script, workload, threads)}
    ours = CONTESTANTS["ours, compiled" if compiled else OURS]
    run(ours, workload, threads)
    ours = dataclasses.replace(ours, arguments=(*ours.arguments, "--train.max_steps", str(2 * workload.total_steps)))
    found[OURS] = run(ours, workload, threads, resumes=True)
    return {name: result["seconds_to_first_step"] for name, result in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="each block of both, which find compiled code of the run before")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    threads = usable_cpus()
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
        size = dataclasses.replace(SIZES[arguments.size], steps=2)
        workload = Workload(size, Path(folder), dtype=arguments.dtype, warmup_steps=2, save=True)
        prepare(workload)
        rounds = [seconds_to_next_step(workload, threads, compiled=arguments.compile) for _ in range(arguments.rounds + 1)][1:]
    ratios = [seconds[OURS] / seconds[SCRIPT] for seconds in rounds]
    against = "the script with our loss, blocks compiled" if arguments.compile else "the script"
    print(
        f"{header(workload, arguments.size, threads)}\n\nFrom the command to the next step, ours against {against}: "
        f"{spread(ratios)} in {len(rounds)} rounds; the script: "
        f"{statistics.median(seconds[SCRIPT] for seconds in rounds):.1f} s."
    )


if __name__ == "__main__":
    main()
