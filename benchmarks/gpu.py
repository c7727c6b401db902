"""Compares the project with others on one GPU, in one script of under 8 minutes.

python -m benchmarks.gpu [--wheels FOLDER] [--out FILE] [--smallest]

Each table is printed, and appended to --out, as soon as it is complete. A contestant that fails or takes too long is reported
in one line, the rest continues, and the exit code is 1. --wheels: installs missing packages from a folder of wheels, for
machines without a network. --smallest: a tiny model and a few steps on any device, including a CPU, to check the script; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import BASE, CONTESTANTS, Contestant, by_round, chosen, header, measure, speed_and_memory, table
from benchmarks.workloads import SIZES, Workload
from dist_trainer.distributed.machine import usable_cpus

NEEDED = ("pyarrow", "accelerate")
"""What a machine with nothing but torch and transformers may lack."""
BEST_LOOP, OURS, FP16, HF = "bare, compiled, lean", "ours, compiled", "ours, compiled, fp16", "HF Trainer"
AGAINST = ((OURS, BEST_LOOP), (OURS, HF), (FP16, OURS))
LONGEST_RUN = 120.0
"""Seconds that one run may take, so that one that hangs leaves time for others."""


@dataclass(frozen=True)
class Measurement:
    """What is measured in turn, in bf16 unless a contestant says otherwise."""

    size: str
    contestants: dict[str, Contestant]
    rounds: int
    ends: float
    """Seconds after the script's start at which no run of it may continue."""


def measurements() -> list[Measurement]:
    compared = {name: CONTESTANTS[name] for name in chosen(f"{BEST_LOOP}; {HF}; {OURS}")}
    ours = CONTESTANTS[OURS]
    fp16 = dataclasses.replace(ours, arguments=(*ours.arguments, "--precision.dtype", "fp16"))
    return [
        Measurement("124m-gpu", {**compared, FP16: fp16}, rounds=2, ends=320),
        Measurement("1b-gpu", {OURS: ours}, rounds=1, ends=460),
    ]


def measured(measurement: Measurement, started: float, *, smallest: bool) -> tuple[str, bool]:
    """The table and figures, with a line for each contestant that failed; and whether all succeeded."""
    shape = dataclasses.replace(SIZES["overhead"], steps=4) if smallest else SIZES[measurement.size]
    threads = min(8, usable_cpus())
    failures: dict[str, str] = {}
    # A killed run may still be writing here; that must not end the others.
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-", ignore_cleanup_errors=True) as folder:
        workload = Workload(shape, Path(folder), dtype="bf16")
        results = measure(
            measurement.contestants,
            workload,
            rounds=1 if smallest else measurement.rounds,
            threads=threads,
            rehearses=False,
            limit=lambda: None if smallest else min(LONGEST_RUN, max(0.0, started + measurement.ends - time.monotonic())),
            failures=failures,
        )
    lines = [*figures(results, workload.tokens_per_step), *(f"- {name}: {in_a_line(why)}" for name, why in failures.items())]
    parts = [header(workload, measurement.size, threads), "\n".join(lines)]
    if BASE in results:
        parts.insert(1, table(results, workload))
    return "\n\n".join(parts), not failures


def figures(results: dict[str, list[dict[str, Any]]], tokens: int) -> Iterator[str]:
    """Lines with the results of each contestant, at `tokens` per step, and comparisons."""
    for name, found in results.items():
        speed = statistics.median(tokens / result["step_seconds"] for result in found)
        memory = statistics.median(result["peak_bytes"] for result in found)
        yield f"- {name}: {speed:,.0f} tokens/s, {memory / 2**30:.2f} GiB"
    for name, other in AGAINST:
        if pairs := by_round(results.get(name, []), results.get(other, [])):
            times, share = speed_and_memory(pairs)
            yield f"- {name} against {other}: {times} times the tokens/s, {share} of the memory"


def in_a_line(why: str) -> str:
    """The command, and the end of its output."""
    first, *others = why.strip().splitlines() or [""]
    return f"{first} {others[-1].strip()}" if others else first


def install(wheels: Path) -> None:
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    for name in missing:  # one by one, so that a missing wheel does not stop the others
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", str(wheels), name],
            check=False,
        )


def main(words: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smallest", action="store_true")
    arguments = parser.parse_args(words)
    if arguments.wheels:
        install(arguments.wheels)
    all_well = True
    for measurement in measurements():
        try:
            text, well = measured(measurement, started, smallest=arguments.smallest)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text, well = f"{measurement.size}: {in_a_line(f'{type(error).__name__}: {error}')}", False
        all_well &= well
        print(text + "\n", flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(text + "\n\n")
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
