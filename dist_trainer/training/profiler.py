"""Records the steps of profile.steps: a trace of each rank for Perfetto, the memory history on GPUs, and the cost of exchanging
gradients.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from dist_trainer.config.values import parse_profile_steps
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.storage.files import replace_file, staged_file
from dist_trainer.training.saving import TrainingResult
from dist_trainer.training.step import StepResult

if TYPE_CHECKING:
    from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
MEMORY_HISTORY_ENTRIES = 200_000
"""Maximum number of recorded allocations (the newest): some tens of megabytes."""


class Profiler:
    """A callback that records steps. Files that cannot be written are warnings."""

    def __init__(self, steps: str | None) -> None:
        """`steps`: the value of profile.steps."""
        self._text = steps
        self._steps = range(0)
        self._first_step = 0
        self._profile: profile | None = None
        self._has_recorded = False

    def on_fit_start(self, trainer: Trainer) -> None:
        """Find out which of the steps the run will reach; log those it will not."""
        requested = range(0) if self._text is None else parse_profile_steps(self._text)
        done, last = trainer.progress.step, trainer.max_steps
        self._steps = range(max(requested.start, done + 1), min(requested.stop, last + 1))
        if trainer.world.is_main and len(self._steps) < len(requested):
            recorded = f"only {_format_steps(self._steps)} will be" if self._steps else "nothing is"
            log.warning(
                "profile.steps: %s, but the run covers steps %d to %d; %s recorded", self._text, done + 1, last, recorded
            )
        self._start_if_due(trainer)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Go from step to step; write the record after the last one."""
        self._start_if_due(trainer)
        if self._profile is not None:
            if result.step + 1 == self._steps.stop:
                self._finish(trainer)
            elif result.step + 1 >= self._first_step:
                self._profile.step()

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Write only the memory history, which may show the reason."""
        if self._profile is not None:
            with suppress(OSError, RuntimeError):
                write_memory_history(self._path(trainer, range(self._first_step, trainer.progress.step + 2), "memory"))
            with suppress(OSError, RuntimeError):
                self._profile.stop()
            self._profile = None

    def close(self, trainer: Trainer, result: TrainingResult | None) -> None:
        """Write what was recorded if the run ends before the last of the steps."""
        if result is not None and trainer.progress.step >= self._first_step:
            self._finish(trainer)
        if self._profile is not None:
            self._profile.stop()
        if result is not None and self._steps and not self._has_recorded and trainer.world.is_main:
            log.warning("profile.steps: the run has ended at step %d, before any of them", trainer.progress.step)

    def _start_if_due(self, trainer: Trainer) -> None:
        """Start one step early: torch prepares in that step, and would otherwise do so in the first recorded one."""
        next_step = trainer.progress.step + 1
        if self._profile is not None or self._has_recorded or not self._steps or next_step < self._steps.start - 1:
            return
        self._first_step = self._steps.start
        on_gpu = trainer.world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

        def schedule(steps_since: int) -> ProfilerAction:
            return ProfilerAction.RECORD if next_step + steps_since >= self._first_step else ProfilerAction.WARMUP

        # acc_events changes nothing in a single cycle; without it some versions of torch warn of cycles that follow.
        self._profile = profile(activities=activities, schedule=schedule, acc_events=True)
        self._profile.start()
        if on_gpu:
            record_memory_history(MEMORY_HISTORY_ENTRIES)

    def _finish(self, trainer: Trainer) -> None:
        """Write what was recorded, and log what the exchange costs; for all ranks."""
        if self._profile is None:
            return
        steps, self._has_recorded = range(self._first_step, trainer.progress.step + 1), True
        trainer.world.heartbeat.mark("saving", step=trainer.progress.step)
        with trainer.between_steps():
            cost = self._write(trainer, steps)
            costs = [cost for cost in gather_objects(cost, trainer.world) if cost is not None]
            if costs and trainer.world.world_size > 1 and trainer.world.is_main:
                comm_ms, exposed_ms = (sum(values) / len(costs) for values in zip(*costs, strict=True))
                log.info(
                    "profile: exchanging gradients takes comm_ms %.2f per step, of which comm_exposed_ms %.2f is "
                    "not hidden by computation (mean of %d ranks, %s)",
                    *(comm_ms, exposed_ms, len(costs), _format_steps(steps)),
                )
                cost_of_step = {"first_step": steps.start, "comm_ms": comm_ms, "comm_exposed_ms": exposed_ms}
                trainer.log({"kind": "profile", "step": steps[-1], **cost_of_step})

    def _write(self, trainer: Trainer, steps: range) -> tuple[float, float] | None:
        """Stop, and write the files. Returns what `exchange_cost` does, None also if a file cannot be written."""
        recorded, self._profile = self._profile, None
        assert recorded is not None, "it has just been asked"
        try:
            recorded.stop()
            if trainer.world.device.type == "cuda":
                write_memory_history(self._path(trainer, steps, "memory"))
            with tempfile.TemporaryDirectory(prefix="dist_trainer-") as folder:
                recorded.export_chrome_trace(f"{folder}/trace.json")
                trace = Path(folder, "trace.json").read_bytes()
            path = self._path(trainer, steps, "json.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, [gzip.compress(trace, compresslevel=4)], durable=False)
            log.info("profile: %s are recorded in %s; open it at ui.perfetto.dev", _format_steps(steps), path)
            return exchange_cost(json.loads(trace)["traceEvents"])
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("profile: %s could not be recorded: %s", _format_steps(steps), error)
            return None

    def _path(self, trainer: Trainer, steps: range, ending: str) -> Path:
        folder = trainer.config.run_folder / PROFILE_FOLDER
        return folder / f"steps-{steps.start}-{steps[-1]}-rank{trainer.world.rank}.{ending}"


def _format_steps(steps: range) -> str:
    return f"step {steps.start}" if len(steps) == 1 else f"steps {steps.start} to {steps[-1]}"


# torch has no public API for the history of a GPU's memory; a torch without these functions records none.


def record_memory_history(entries: int | None) -> None:
    """Start to keep a history of the newest `entries` allocations; None: stop."""
    if hasattr(torch.cuda.memory, "_record_memory_history"):
        options: dict[str, Any] = {"enabled": None} if entries is None else {"max_entries": entries, "stacks": "python"}
        torch.cuda.memory._record_memory_history(**options)


def write_memory_history(path: Path) -> None:
    """Write the history to `path`.pickle, and stop recording it."""
    if not hasattr(torch.cuda.memory, "_dump_snapshot"):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path.with_suffix(".memory.pickle")) as staging:
            torch.cuda.memory._dump_snapshot(str(staging))
    finally:
        record_memory_history(None)
    log.info("profile: the memory history is next to it; open it at pytorch.org/memory_viz")


# ------------------------------------------------------------------------------------------------ the exchange's cost

_STEP = re.compile(r"step \d+")
_EXCHANGE = re.compile(r"reduce|gather", re.IGNORECASE)
"""In the collectives' names: not DDP's broadcast when it sorts its buckets."""


def exchange_cost(events: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """From a Chrome trace: ms per step in which gradients are being exchanged, including waiting for other ranks; and how many
    of these this rank spends without computing. None if the trace contains no step.

    An exchange is a reduction or gather that starts within a step's range. On a GPU, it is an NCCL kernel (by its launch time),
    and computing is any other kernel. On a CPU, it lasts from the call until gloo's thread has the result, and computing is any
    operator or node of the backward pass, except while it hands a bucket over to gloo. Cores that gloo's threads take away from
    computing are not counted.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [span for span in spans if span.get("cat") == "user_annotation" and _STEP.fullmatch(span["name"])]
    if not steps:
        return None
    launched = {_correlation(span): span["ts"] for span in spans if span.get("cat") in ("cuda_runtime", "cuda_driver")}
    on_gpu = any(span.get("cat") == "kernel" for span in spans)
    edges: list[tuple[float, str, int]] = []
    for span in spans:
        kind = _kind_on_gpu(span) if on_gpu else _kind_on_cpu(span)
        begin = launched.get(_correlation(span), span["ts"]) if on_gpu else span["ts"]
        is_in_step = any(step["ts"] <= begin <= step["ts"] + step["dur"] for step in steps)
        if kind and (kind != "exchange" or is_in_step):
            edges += [(span["ts"], kind, 1), (span["ts"] + span["dur"], kind, -1)]
    edges.sort()
    under_way: Counter[str] = Counter()
    exchanging = exposed = 0.0
    for (moment, kind, change), (next_moment, _, _) in pairwise(edges):
        under_way[kind] += change
        if under_way["exchange"]:
            exchanging += next_moment - moment
            if not under_way["compute"] or under_way["hand over"]:
                exposed += next_moment - moment
    return exchanging / 1000 / len(steps), exposed / 1000 / len(steps)


def _kind_on_gpu(span: Mapping[str, Any]) -> str:
    if span.get("cat") != "kernel":
        return ""
    if "nccl" not in span["name"].lower():
        return "compute"
    return "exchange" if _EXCHANGE.search(span["name"]) else ""


def _kind_on_cpu(span: Mapping[str, Any]) -> str:
    if span.get("cat") == "cpu_op":
        return "hand over" if span["name"].startswith("c10d::") else "compute"
    is_exchange = span.get("cat") == "user_annotation" and span["name"].startswith("gloo:") and _EXCHANGE.search(span["name"])
    return "exchange" if is_exchange else ""


def _correlation(span: Mapping[str, Any]) -> Any:
    return span.get("args", {}).get("correlation")
