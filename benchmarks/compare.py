"""`make bench`: compares our trainer with alternatives, in alternating runs; prints one table of ratios to a bare loop.

    make bench                                           7M parameters, one process, fp32
    make bench ARGS="--size overhead --dtype bf16"       see SIZES in workloads.py
    make bench ARGS="--ranks 2 --only 'bare;ours'"
    make bench ARGS="--size 124m --save --out benchmarks/results/2030-01-01-124m.md"

Each contestant runs in its own process (or --ranks processes), round by round. For each one, the table shows the ratio to the
bare loop of the same round: median over the rounds, smallest and largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, machine_and_versions
from benchmarks.ports import reserved_port
from benchmarks.stopwatch import FOLDER, STARTED
from benchmarks.workloads import SIZES, Workload, prepare
from dist_trainer.distributed.machine import usable_cpus


@dataclass(frozen=True)
class Contestant:
    """A module of contestants/ and its arguments."""

    module: str
    arguments: tuple[str, ...]
    needs: str = "torch"
    """The library that it cannot do without."""


OURS = "ours"
CONTESTANTS = {
    "bare": Contestant("bare", ()),
    "bare, lean": Contestant("bare", ("lean",)),
    "bare, compiled": Contestant("bare", ("compiled",)),
    "bare, compiled, lean": Contestant("bare", ("compiled,lean",)),
    "bare, per block, lean": Contestant("bare", ("per-block,lean",)),
    OURS: Contestant("ours", ("--precision.compile", "false")),
    "ours, compiled": Contestant("ours", ("--precision.compile", "true")),
    "HF Trainer": Contestant("hf_trainer", (), "accelerate"),
    "HF Trainer, compiled": Contestant("hf_trainer", ("compiled",), "accelerate"),
    "HF Trainer, its Llama": Contestant("hf_trainer", ("llama",), "accelerate"),
    "HF Trainer, its Llama, compiled": Contestant("hf_trainer", ("llama", "compiled"), "accelerate"),
    "Lightning": Contestant("lightning_trainer", (), "lightning"),
    "Lightning, compiled": Contestant("lightning_trainer", ("compiled",), "lightning"),
}
BASE = "bare"
SAME_LOSS = 5e-3
"""Relative; bf16 rounds to 4e-3."""


def run(
    contestant: Contestant, workload: Workload, threads: int, *, resumes: bool = False, limit: float | None = None
) -> dict[str, Any]:
    """One run of all its ranks; rank 0's result, with the largest memory of any, and the mean of their losses.

    With `resumes`, it finds what the previous run left in the workload's folder; otherwise it starts from scratch. Raises
    SystemExit if it fails or takes more than `limit` seconds.
    """
    environment = {
        **os.environ,
        FOLDER: str(workload.folder),
        "OMP_NUM_THREADS": str(threads),
        "DIST_TRAINER_CACHE": str(workload.folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as for users, whose second start finds compiled bytecode
    if not resumes:
        shutil.rmtree(workload.folder / "runs", ignore_errors=True)
    command = [sys.executable, "-m", f"benchmarks.contestants.{contestant.module}", *contestant.arguments]
    logs = [workload.folder / f"log-{rank}.txt" for rank in range(workload.ranks)]
    with reserved_port() as port:
        processes = []
        for rank, log in enumerate(logs):
            place = {} if workload.ranks == 1 else _place(rank, workload.ranks, port)
            with log.open("w") as file:
                process = subprocess.Popen(
                    command,
                    env={**environment, **place, STARTED: repr(time.time())},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    cwd=ROOT,
                )
            processes.append(process)
        if failure := _failure(processes, limit):
            raise SystemExit(f"{' '.join(command)} {failure}:\n{logs[0].read_text()[-3000:]}")
    results = [json.loads((workload.folder / f"result-{rank}.json").read_text()) for rank in range(workload.ranks)]
    losses = [result["loss"] for result in results if result["loss"] is not None]
    return results[0] | {
        "loss": statistics.fmean(losses) if losses else None,
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "cpu_seconds": sum(result["cpu_seconds"] for result in results),
    }


def _failure(processes: Sequence[subprocess.Popen[bytes]], limit: float | None) -> str | None:
    """Wait until all have exited; returns what went wrong. After `limit` seconds kills the rest, with their children."""
    end = None if limit is None else time.monotonic() + limit
    try:
        codes = [process.wait(None if end is None else max(0.0, end - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return f"was killed, not done within {limit:.0f} s"
    return "failed" if any(codes) else None


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables that torchrun would set for a worker."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "benchmark"},
    }


# -------------------------------------------------------------------------------------------------- the table


def table(results: dict[str, list[dict[str, Any]]], workload: Workload) -> str:
    columns = ["contestant", "tokens/s", "CPU time a step", "peak memory", "time to the first step"]
    columns += ["longest stall, of a step's time"] if workload.save else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, rounds in results.items():
        pairs = by_round(rounds, results[BASE])
        cells = [
            spread([base["step_seconds"] / own["step_seconds"] for own, base in pairs]),
            *(spread([own[key] / base[key] for own, base in pairs]) for key in _KEYS),
        ]
        if workload.save:
            cells.append(spread([own["stall_seconds"] / own["step_seconds"] for own, _ in pairs]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base = results[BASE]
    median = {key: statistics.median(result[key] for result in base) for key in ("step_seconds", *_KEYS)}
    lines += [
        "",
        f"Ratios to the bare loop, median (smallest to largest) of {len(base)} rounds. The bare loop itself: "
        f"{median['step_seconds'] * 1000:.1f} ms a step of {workload.tokens_per_step} tokens, "
        f"{median['cpu_seconds'] * 1000:.1f} ms of CPU time, {median['peak_bytes'] / 2**30:.2f} GiB, "
        f"{median['seconds_to_first_step']:.1f} s to the first step.",
    ]
    own_cost = _own_cost(results)
    return "\n".join([*lines, *([own_cost] if own_cost else []), *_against_others(results)])


_KEYS = ("cpu_seconds", "peak_bytes", "seconds_to_first_step")


def _own_cost(results: dict[str, list[dict[str, Any]]]) -> str | None:
    """The overhead of our step over the loop with the same settings."""
    if OURS not in results or "bare, lean" not in results:
        return None
    pairs = by_round(results[OURS], results["bare, lean"])
    more = [(own["step_seconds"] - bare["step_seconds"]) * 1000 for own, bare in pairs]
    cpu = [own["cpu_seconds"] / bare["cpu_seconds"] for own, bare in pairs]
    return f"Ours against 'bare, lean': {spread(more, sign='+')} ms a step, CPU time {spread(cpu)}."


def _against_others(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Our trainer against each other one, round by round, without the bare loop's noise."""
    ours = [name for name in results if name.startswith(OURS)]
    others = [name for name in results if not name.startswith((OURS, BASE))]
    if not ours or not others:
        return
    yield "\n| tokens/s (memory) of | " + " | ".join(f"against {other}" for other in others) + " |"
    yield "|---" * (len(others) + 1) + "|"
    for name in ours:
        cells = []
        for other in others:
            cells.append(", ".join(speed_and_memory(by_round(results[name], results[other]))))
        yield f"| {name} | " + " | ".join(cells) + " |"


def by_round(own: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Results of the same rounds; a contestant that failed has none from that round on."""
    return list(zip(own, other, strict=False))


def speed_and_memory(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[str, str]:
    """Ratios of the first to the second of each pair: tokens per second, with their spread, and memory."""
    memory = statistics.median(own["peak_bytes"] / its["peak_bytes"] for own, its in pairs)
    return spread([its["step_seconds"] / own["step_seconds"] for own, its in pairs]), f"{memory:.2f}"


def spread(values: list[float], *, sign: str = "") -> str:
    """Median (smallest to largest); `sign` "+" shows the sign, for differences."""
    middle, least, most = (f"{value:{sign}.3f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def header(workload: Workload, size: str, threads: int) -> str:
    return (
        f"{machine_and_versions()}\nSize {size}, {workload.dtype}, {workload.ranks} rank(s) with {threads} thread(s) each, "
        f"{workload.size.steps} steps timed."
    )


def measure(
    contestants: Mapping[str, Contestant],
    workload: Workload,
    *,
    rounds: int,
    threads: int,
    rehearses: bool = True,
    limit: Callable[[], float | None] = lambda: None,
    failures: dict[str, str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Results by contestant, one per round; `rehearses`: runs an uncounted round first, to fill caches.

    `limit`: called before each run, returns how many seconds it may take. The first failure ends all, unless `failures` is
    given: then it is stored there by the contestant's name, and the others continue.
    """
    prepare(workload)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for number in range(0 if rehearses else 1, rounds + 1):
        for name, contestant in contestants.items():
            if failures and name in failures:
                continue
            try:
                result = run(contestant, workload, threads, limit=limit())
                if number:
                    results[name].append(result)
                _check_same_work(name, result, results)
            except (Exception, SystemExit) as error:
                if failures is None:
                    raise
                failures[name] = str(error)
                print(f"round {number}, {name}: {error}", file=sys.stderr, flush=True)
            else:
                print(f"round {number}, {name}: {result['step_seconds'] * 1000:.1f} ms a step", file=sys.stderr, flush=True)
    return {name: found for name, found in results.items() if found}


def _check_same_work(name: str, result: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """All contestants that report their last loss must report the same: same weights, sequences and updates."""
    losses = [other["loss"] for rounds in results.values() for other in rounds if other["loss"] is not None]
    if losses and result["loss"] is not None and abs(result["loss"] - losses[0]) > SAME_LOSS * losses[0]:
        raise SystemExit(f"{name} ends with a loss of {result['loss']}, others with {losses[0]}: they do not do the same work")


def chosen(only: str | None) -> list[str]:
    """The contestants that `only` names (default: all) and whose libraries are installed. Raises ValueError."""
    names = [BASE, *(name.strip() for name in only.split(";"))] if only else list(CONTESTANTS)
    if unknown := [name for name in names if name not in CONTESTANTS]:
        raise ValueError(f"no contestant {unknown[0]!r}; there are {'; '.join(CONTESTANTS)}")
    missing = {name: CONTESTANTS[name].needs for name in names if not importlib.util.find_spec(CONTESTANTS[name].needs)}
    for name, library in missing.items():
        print(f"left out: {name}, for {library} is not installed", file=sys.stderr)
    return [name for name in dict.fromkeys(names) if name not in missing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7m")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps that are timed, instead of the size's own number")
    parser.add_argument("--only", help=f"some of: {'; '.join(CONTESTANTS)} (with semicolons between; '{BASE}' always runs)")
    parser.add_argument(
        "--save", action="store_true", help="write a checkpoint midway, and report how long training stood still"
    )
    parser.add_argument("--out", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    try:
        names = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    size = dataclasses.replace(SIZES[arguments.size], steps=arguments.steps) if arguments.steps else SIZES[arguments.size]
    threads = max(1, usable_cpus() // arguments.ranks)
    with tempfile.TemporaryDirectory(prefix="dist-trainer-bench-") as folder:
        workload = Workload(size, Path(folder), ranks=arguments.ranks, dtype=arguments.dtype, save=arguments.save)
        contestants = {name: CONTESTANTS[name] for name in names}
        results = measure(contestants, workload, rounds=arguments.rounds, threads=threads)
    text = f"{header(workload, arguments.size, threads)}\n\n{table(results, workload)}\n"
    print(text)
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
