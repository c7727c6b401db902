"""`run_ranks`: a function on several forked processes that form one process group by gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.ports import reserved_port
from dist_trainer.run import cli

TIMEOUT_SECONDS = 300
"""After this a rank hangs, however busy the machine."""


def run_ranks(world_size: int, function: Callable[[], Any]) -> list[Any]:
    """What `function()` returns on each rank, by rank. One rank's exception is raised here, with its traceback."""
    with reserved_port() as port:
        pipes, processes = _start(world_size, port, function)
        try:
            outcomes = [
                pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else ("hung", f"rank {r} hangs") for r, pipe in enumerate(pipes)
            ]
        except EOFError:
            outcomes = [("died", "a rank died without a word")]
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    for kind, outcome in outcomes:
        if kind != "result":
            raise AssertionError(outcome)
    return [outcome for _, outcome in outcomes]


def exit_codes(world_size: int, command: Callable[[], int]) -> list[int | None]:
    """The exit code of each rank's process, which `command()` returns; minus a signal's number if one killed it."""
    with reserved_port() as port:
        _, processes = _start(world_size, port, lambda: os._exit(command()))
        for process in processes:
            process.join(TIMEOUT_SECONDS)
    still_alive = [process for process in processes if process.is_alive()]
    for process in still_alive:
        process.kill()
    assert not still_alive, f"{len(still_alive)} of {world_size} ranks hang"
    return [process.exitcode for process in processes]


def _start(world_size: int, port: int, function: Callable[[], Any]) -> tuple[list[Any], list[Any]]:
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(world_size):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world_size, port, function, sending))
        process.start()
        sending.close()
        pipes.append(receiving)
        processes.append(process)
    return pipes, processes


def _rank(rank: int, world_size: int, port: int, function: Callable[[], Any], sending: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    cli.HOLD_BACK_SECONDS = 1.0  # torchrun would signal a rank that prints nothing as soon as another has exited
    if world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    try:
        sending.send(("result", function()))
    except BaseException:
        sending.send(("error", f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        sending.close()
        os._exit(0)
