"""One GPU in one go, under 8 minutes: where the project says it stands, beside what it compares itself with.

python -m benchmarks.gpu [--wheels FOLDER] [--out FILE] [--smallest]

--wheels: installs what is missing from a folder of wheels, for machines without a network. --smallest: a tiny model and a few
steps on whatever is here, a CPU too, to see that the script works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.compare import BASE, chosen, header, measure, table
from benchmarks.workloads import SIZES, Workload

NEEDED = ("jsonargparse", "docstring_parser", "filelock", "pyarrow", "accelerate")
"""What a machine with nothing but torch and transformers may lack."""
BEST_LOOP, OURS, HF = "bare, compiled, lean", "ours, compiled", "HF Trainer"


def install(wheels: Path) -> None:
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    for name in missing:  # one by one: what has no wheel there is done without
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--find-links", str(wheels), name],
            check=False,
        )


def row(size: str, dtype: str, only: str, rounds: int, *, smallest: bool) -> tuple[str, dict[str, list[dict[str, Any]]], int]:
    """A table, its results, and the tokens of a step."""
    shape = dataclasses.replace(SIZES["overhead"], steps=4) if smallest else SIZES[size]
    threads = min(8, os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
        workload = Workload(shape, Path(folder), dtype=dtype)
        names = chosen(only)
        if HF not in names and BEST_LOOP not in names:
            names.remove(BASE)  # nothing is compared with it
        results = measure(names, workload, rounds=rounds, threads=threads, rehearses=False)
        text = header(workload, size, threads)
        if BASE in results:
            text += f"\n\n{table(results, workload)}"
    return text, results, workload.tokens_per_step


def tokens_per_second(results: list[dict[str, Any]], tokens: int) -> float:
    return statistics.median(tokens / result["step_seconds"] for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smallest", action="store_true")
    given = parser.parse_args()
    if given.wheels:
        install(given.wheels)
    small = given.smallest
    first, bf16, tokens = row("124m-gpu", "bf16", f"{BEST_LOOP}; {OURS}; {HF}", 1 if small else 2, smallest=small)
    second, fp16, _ = row("124m-gpu", "fp16", OURS, 1, smallest=small)
    third, large, large_tokens = row("1b-gpu", "bf16", OURS, 1, smallest=small)
    ours = tokens_per_second(bf16[OURS], tokens)
    lines = [f"- 124M, bf16: {ours:,.0f} tokens/s, {ours / tokens_per_second(bf16[BEST_LOOP], tokens):.3f} of the bare loop's"]
    if HF in bf16:
        memory = bf16[OURS][0]["peak_bytes"] / bf16[HF][0]["peak_bytes"]
        faster = ours / tokens_per_second(bf16[HF], tokens)
        lines.append(f"- against HF Trainer: {faster:.2f} times the tokens/s, {memory:.2f} of the peak memory")
    lines.append(f"- fp16 with GradScaler: {tokens_per_second(fp16[OURS], tokens) / ours:.3f} of bf16's tokens/s")
    lines.append(f"- 1B, bf16: {tokens_per_second(large[OURS], large_tokens):,.0f} tokens/s")
    text = "\n\n".join([first, second, third, "\n".join(lines)]) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
