"""Starts the ranks of a replay on this machine, and runs each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.launch_env import rank_info_or_none
from dist_trainer.distributed.machine import usable_cpus
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_CRASHED, EXIT_FINISHED, DistTrainerError, RefusedError, StoppedError, counted
from dist_trainer.run.lifecycle import on_all_ranks
from dist_trainer.run.replay import Line, Plan, read_lines, replay, without_traces, write_lines

FOUND_FILE, ERROR_FILE, OUTPUT_FILE = "found.jsonl", "error.json", "output.txt"
"""File in the scratch folder of a replay."""
POLL_SECONDS, SECONDS_TO_STOP = 0.5, 30.0
"""How often a signal is looked for, and how long the ranks may take to stop."""
LAST_LINES = 15
"""Lines of a crashed replay's output that the error quotes."""
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def replay_as_rank(scratch: Path, *, stop_request: StopRequest | None = None) -> int:
    """Replay the plan in the folder `scratch` as this process's rank; write the result, or the error, into that folder."""

    def attempt(world: DistributedContext) -> int:
        lines = replay(plan, world)
        if world.is_main:
            write_lines(lines, scratch / FOUND_FILE)
        return EXIT_FINISHED

    try:
        plan = Plan.read(scratch)
        return on_all_ranks(attempt, without_traces(plan.config, scratch), stop_request=stop_request)
    except DistTrainerError as error:
        info = rank_info_or_none()
        if info is None or info.rank == 0:
            (scratch / ERROR_FILE).write_text(json.dumps([str(error), isinstance(error, RefusedError)]), encoding="utf-8")
        raise


def start_ranks(plan: Plan, ranks: int, *, threads: int, stop_request: StopRequest) -> list[Line]:
    """Replay `plan` on `ranks` ranks of this machine, with `threads` CPU threads each; returns the lines found.

    Raises RefusedError if a rank rejects the plan, DistTrainerError if a rank crashes, and StoppedError after a signal.
    """
    plan.write()
    words = ["-m", "dist_trainer.verify", "--replay", str(plan.scratch)]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={ranks}"]
        words = [*torchrun, *words]
    output = plan.scratch / OUTPUT_FILE
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *words], env=_environment(threads), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
        code = _wait_for(process, stop_request)
    return found_by(plan.scratch, ranks, code)


def _wait_for(process: subprocess.Popen[bytes], stop_request: StopRequest) -> int:
    """The exit code of `process`. Raises StoppedError after a signal, when `process` and its ranks have stopped."""
    while not stop_request:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=POLL_SECONDS)
    process.terminate()
    try:
        process.wait(timeout=SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    raise StoppedError(stop_request.signal_number)


def found_by(scratch: Path, ranks: int, code: int = EXIT_CRASHED) -> list[Line]:
    """The result of the replay in `scratch`. Raises its error; if it left none, an error with the last lines of its output."""
    with suppress(OSError):
        return read_lines(scratch / FOUND_FILE)
    with suppress(OSError, ValueError):
        message, is_refused = json.loads((scratch / ERROR_FILE).read_text(encoding="utf-8"))
        raise (RefusedError if is_refused else DistTrainerError)(f"on {counted(ranks, 'rank')}: {message}")
    said = (scratch / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    raise DistTrainerError("\n".join([f"the replay on {counted(ranks, 'rank')} ended with exit code {code}; it said:", *said]))


def threads_for(ranks: int, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads for each of at most `ranks` ranks: OMP_NUM_THREADS, else an equal share of the cores."""
    named = environment.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() and int(named) else max(1, usable_cpus() // ranks)


def _environment(threads: int) -> dict[str, str]:
    """The same as in the launch files: no shared store (pytorch issue 135712), and waiting threads do not spin."""
    own = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    own.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return {**own, "OMP_NUM_THREADS": str(threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
