"""Records single steps of a run: a trace of each rank that Perfetto opens, on GPUs the memory's history too."""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dist_trainer.config.values import parse_profile_steps
from dist_trainer.data.batch import Batch
from dist_trainer.distributed.collectives import gather_objects
from dist_trainer.storage.files import replace_file
from dist_trainer.training.exchange_cost import ExchangeCost, exchange_cost
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
MEMORY_HISTORY_ENTRIES = 200_000
"""Allocations remembered at most, the newest: some tens of megabytes."""

PHASES = {
    "_fetch": "data",
    "loss_function": "forward",
    "precision.backward": "backward",
    "precision.step": "optimizer",
    "_validate_if_due": "validation",
    "_save": "checkpoint",
}
"""What the trainer calls → its range's name in the trace; the exchange bears torch's own names (gloo:..., nccl:...)."""


@contextmanager
def profiled(trainer: Trainer) -> Generator[None]:
    """Record the steps that profile.steps names, of what `trainer` does inside; for all ranks.

    The names are laid over the trainer's own methods for as long as it records, so the step knows nothing of them and
    costs nothing otherwise. What cannot be written costs a warning.
    """
    steps = steps_to_record(trainer)
    if not steps:
        yield
        return
    recorder = Recorder(trainer, steps)
    with _replaced(trainer, "train_step", recorder.train_step), _replaced(trainer, "_fetch", recorder.fetch):
        try:
            yield
        except BaseException:
            recorder.break_off()
            raise
        recorder.finish()  # a signal came before the last of the steps
    if not recorder.has_recorded and trainer.world.is_main:
        log.warning("profile.steps: the run has ended at step %d, before any of them", trainer.progress.step)


def steps_to_record(trainer: Trainer) -> range:
    """The part of profile.steps that the run is going to do; says which part it is not."""
    text = trainer.config.profile.steps
    if text is None:
        return range(0)
    asked, done, last = parse_profile_steps(text), trainer.progress.step, trainer.max_steps
    steps = range(max(asked.start, done + 1), min(asked.stop, last + 1))
    if trainer.world.is_main and len(steps) < len(asked):
        recorded = f"only {_in_words(steps)} will be" if steps else "nothing is"
        log.warning("profile.steps: %s, but the run goes from step %d to %d; %s recorded", text, done + 1, last, recorded)
    return steps


class Recorder:
    """Records `steps` of `trainer`: the trainer calls its `train_step` and `fetch` instead of its own."""

    def __init__(self, trainer: Trainer, steps: range) -> None:
        self._trainer = trainer
        self._steps = steps
        self._train_step, self._fetch = trainer.train_step, trainer._fetch
        self._recording: _Recording | None = None
        self._first_step = 0
        self.has_recorded = False

    def train_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """As the trainer's own, and recorded where it is one of the steps."""
        step = self._trainer.progress.step + 1
        if step == self._steps.start:
            with self._trainer.throughput.paused():
                self._recording, self._first_step = _Recording(self._trainer), step
        if self._recording is None:
            return self._train_step(micro_batches, target_tokens)
        with record_function(f"step {step}"):
            return self._train_step(micro_batches, target_tokens)

    def fetch(self, batches: Iterator[Batch]) -> Any:
        """As the trainer's own; with it a step ends, and after the last one the record."""
        upcoming = self._fetch(batches) if self._recording is None else _named("data", self._fetch)(batches)
        if self._trainer.progress.step + 1 >= self._steps.stop:
            self.finish()
        return upcoming

    def finish(self) -> None:
        """Write what was recorded, and say what the exchange costs; for all ranks. Nothing if that is done."""
        if self._recording is None:
            return
        trainer, self.has_recorded = self._trainer, True
        recording, self._recording = self._recording, None
        steps = range(self._first_step, trainer.progress.step + 1)
        trainer.world.heartbeat.mark("saving", step=trainer.progress.step)
        with trainer.throughput.paused():
            cost = recording.write(steps)
            _tell_cost(trainer, steps, gather_objects(cost, trainer.world))

    def break_off(self) -> None:
        """The run fails: leave what there is of its memory, which may tell why, and no more."""
        if self._recording is not None:
            steps = range(self._first_step, self._trainer.progress.step + 2)
            self._recording.break_off(steps)


class _Recording:
    """torch's profiler at work, with names laid over the trainer's methods."""

    def __init__(self, trainer: Trainer) -> None:
        self._world = trainer.world
        self._folder = trainer.config.run_folder / PROFILE_FOLDER
        self._names = ExitStack()
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities, acc_events=True):  # what tracing a GPU sets up once must not be in the trace
                torch.cuda.synchronize(self._world.device)
            _remember_memory(MEMORY_HISTORY_ENTRIES)
        for path, name in PHASES.items():
            if path != "_fetch":  # the recorder's own stands there
                owner, attribute = _owner_of(trainer, path)
                self._names.enter_context(_replaced(owner, attribute, _named(name, getattr(owner, attribute))))
        # acc_events changes nothing in a single cycle; without it some versions of torch warn of cycles that follow.
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()

    def write(self, steps: range) -> ExchangeCost | None:
        """Stop, and write the files of `steps`; what the exchange costs this rank, None where that cannot be known."""
        try:
            self._stop()
            self._write_memory(steps)
            trace = self._trace()
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._path(steps, "json.gz")
            replace_file(path, [gzip.compress(trace, compresslevel=4)], durable=False)
            log.info("profile: %s are recorded in %s; ui.perfetto.dev opens it", _in_words(steps), path)
            return exchange_cost(json.loads(trace)["traceEvents"])
        except (OSError, RuntimeError, ValueError) as error:
            log.warning("profile: %s could not be recorded: %s", _in_words(steps), error)
            return None

    def break_off(self, steps: range) -> None:
        """Stop; write the memory's history alone."""
        with suppress(OSError, RuntimeError):
            self._write_memory(steps)
        with suppress(OSError, RuntimeError):
            self._stop()

    def _stop(self) -> None:
        self._names.close()
        self._profile.stop()

    def _trace(self) -> bytes:
        with tempfile.TemporaryDirectory(prefix="dist_trainer-") as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()

    def _write_memory(self, steps: range) -> None:
        if self._world.device.type == "cuda" and hasattr(torch.cuda.memory, "_dump_snapshot"):
            staging = self._path(steps, "memory.staging")
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                torch.cuda.memory._dump_snapshot(str(staging))
                os.replace(staging, self._path(steps, "memory.pickle"))
            finally:
                _remember_memory(None)
                with suppress(OSError):
                    staging.unlink()
            log.info("profile: the memory's history is beside it; pytorch.org/memory_viz opens it")

    def _path(self, steps: range, ending: str) -> Path:
        return self._folder / f"steps-{steps.start}-{steps[-1]}-rank{self._world.rank}.{ending}"


def _remember_memory(entries: int | None) -> None:
    """Keep a history of allocations from now on (None: no longer), where this torch can."""
    if not hasattr(torch.cuda.memory, "_record_memory_history"):
        return
    if entries is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=entries, stacks="python")


def _tell_cost(trainer: Trainer, steps: range, costs: list[ExchangeCost | None]) -> None:
    """The mean over ranks, which are equally busy with being recorded."""
    known = [cost for cost in costs if cost is not None]
    if len(costs) < 2 or not known or not trainer.world.is_main:
        return
    comm_ms = sum(cost.comm_ms for cost in known) / len(known)
    exposed_ms = sum(cost.comm_exposed_ms for cost in known) / len(known)
    log.info(
        "profile: exchanging gradients takes comm_ms %.2f a step, of which the backward pass does not hide "
        "comm_exposed_ms %.2f (mean of %d ranks, %s)",
        *(comm_ms, exposed_ms, len(known), _in_words(steps)),
    )
    metadata = {"first_step": steps.start, "comm_ms": comm_ms, "comm_exposed_ms": exposed_ms, "time": time.time()}
    trainer.tracker.log({"kind": "profile", "step": steps[-1], **metadata})


def _owner_of(trainer: Trainer, path: str) -> tuple[Any, str]:
    """The object that has the attribute at the end of `path`, and its name."""
    owner: Any = trainer
    *parts, attribute = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, attribute


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return call


@contextmanager
def _replaced(owner: Any, attribute: str, function: Callable[..., Any]) -> Generator[None]:
    """`function` in the place of a method of `owner`, for this object alone and only inside."""
    own = vars(owner)
    before = own.get(attribute)
    own[attribute] = function
    try:
        yield
    finally:
        if before is None:
            del own[attribute]
        else:
            own[attribute] = before


def _in_words(steps: range) -> str:
    return f"step {steps.start}" if len(steps) == 1 else f"steps {steps.start} to {steps[-1]}"
