"""Callbacks: the single interface for everything that happens around steps, including users' own code."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dist_trainer.config.registry import build
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.collectives import barrier, gather_objects
from dist_trainer.errors import CallbackError, ConfigError
from dist_trainer.training.saving import TrainingResult
from dist_trainer.training.step import StepResult, trace_range
from dist_trainer.training.validation import ValidationResult

if TYPE_CHECKING:
    from dist_trainer.training.trainer import Trainer

log = logging.getLogger(__name__)


class Callback(Protocol):
    """The methods that a callback may have. Any object with some of them is a callback; it need not inherit from this class.

    Callbacks are called in the order of the list, on every rank, in the training thread. Each decides on which ranks it acts
    (`trainer.world.rank`); anything that communicates between ranks must be called on all of them.
    """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before anything is compiled or trained. If the run is resumed, `trainer.progress` is the checkpoint's."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After each step. Reading a tensor of `result` waits for the device, so doing it at each step slows down training.

        Put anything that takes time inside `with trainer.between_steps():`.
        """

    def on_validation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        """After each validation that was not interrupted by a signal; this time does not count as step time."""

    def on_checkpoint(self, trainer: Trainer, step: int, folder: Path) -> None:
        """At the end of the first step after the checkpoint of `step` has become visible in `folder`; for the last ones, after
        training has ended. Checkpoints are written in the background, so training is a few steps further by then.
        """

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """`fit` is about to raise `error`, here or on all ranks; no checkpoint is being written. Do not communicate."""

    def close(self, trainer: Trainer, result: TrainingResult | None) -> None:
        """Always the last call; `result` is None after an error."""


HOOKS = ("on_fit_start", "on_step_end", "on_validation_end", "on_checkpoint", "on_error", "close")
LONG_HOOKS = ("on_validation_end", "on_checkpoint")
"""Phases that may take hours without other ranks considering this one hung."""


def build_callbacks(config: TrainingConfig) -> list[object]:
    """Call the functions named in train.callbacks with `config`. Raises ConfigError if one cannot be used."""
    callbacks = [build({}, name, "train.callbacks", config, kind=object) for name in config.train.callbacks]
    CallbackList(callbacks)
    return callbacks


class LineWriter(Protocol):
    """Takes the lines of metrics.jsonl: the part of a tracker that a trainer needs."""

    def log(self, line: dict[str, Any]) -> None:
        """Take a line."""

    def sync(self) -> None:
        """Return when the lines so far survive a power cut. Called by the thread that writes checkpoints, before one becomes
        visible.
        """


class CallbackList:
    """Calls the callbacks of one trainer. An error in one, on any rank, ends the run on all ranks and names it."""

    def __init__(self, callbacks: Sequence[object]) -> None:
        self.callbacks = list(callbacks)
        for callback in callbacks:
            if not any(callable(getattr(callback, hook, None)) for hook in HOOKS):
                raise ConfigError(f"callbacks: {_name(callback)} has none of the methods {', '.join(HOOKS)}")
        methods = {hook: [(callback, getattr(callback, hook, None)) for callback in callbacks] for hook in HOOKS}
        self._methods = {hook: [(c, method) for c, method in pairs if callable(method)] for hook, pairs in methods.items()}
        self.error: CallbackError | None = None
        """The error of the first callback that failed on this rank. The others are still called, so that ranks stay in step."""
        self._traceback = ""

    def call(self, hook: str, trainer: Trainer, *arguments: object) -> None:
        """Call `hook` of each callback that has it."""
        if hook in LONG_HOOKS:
            trainer.world.heartbeat.mark("in a callback", step=trainer.progress.step)
        for callback, method in self._methods[hook]:
            try:
                method(trainer, *arguments)
            except (Exception, SystemExit) as error:
                if self.error is None:
                    where = f"rank {trainer.world.rank}: " if trainer.world.world_size > 1 else ""
                    self.error = CallbackError(f"{where}{_what_failed(callback, hook)} failed: {type(error).__name__}: {error}")
                    self.error.exit_code = getattr(error, "exit_code", CallbackError.exit_code)
                    self._traceback = "".join(traceback.format_exception(error))

    def raise_error(self, trainer: Trainer) -> None:
        """Raise on all ranks the error that a callback raised on any of them. Called by all ranks."""
        barrier(trainer.world)
        self.log_error()
        for error in gather_objects(self.error, trainer.world):
            if error is not None:
                raise error

    def log_error(self) -> None:
        """Log the traceback of this rank's error, if there is one."""
        if self._traceback:
            log.error("%s\n%s", self.error, self._traceback.rstrip())
            self._traceback = ""


class MetricsLogger:
    """Passes the metrics of steps and validations to `trainer.log`."""

    def __init__(self, log_every_steps: int) -> None:
        self.log_every_steps = log_every_steps
        self._logged_step = 0

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Log the step if it is due."""
        if result.step % self.log_every_steps == 0 or result.step in (1, trainer.max_steps):
            self._log(trainer, result)

    def on_validation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        """Log the result."""
        step, best = trainer.progress.step, trainer.progress.best_step
        trainer.log({"kind": "validation", "step": step, **result.metrics(), "best": best == step, "seconds": result.seconds})

    def on_error(self, trainer: Trainer, error: BaseException) -> None:
        """Log the step at which training diverged, if it was not due. It is the same on all ranks."""
        step = trainer.divergence.diverged_at
        if step is not None and step.step > self._logged_step:
            self._log(trainer, step)

    def _log(self, trainer: Trainer, result: StepResult) -> None:
        """The only place where a step waits for the device."""
        trainer.world.heartbeat.mark("logging", step=trainer.progress.step)
        self._logged_step = result.step
        with trace_range("log"):
            trainer.log(
                {
                    "kind": "train",
                    **result.metrics(trainer.world),
                    "skipped_steps": trainer.divergence.skipped_steps,
                    "epoch": trainer.sampler.epoch_of(result.step),
                    **trainer.throughput.measure(step=result.step, tokens=result.target_tokens_so_far),
                }
            )


def _name(callback: object) -> str:
    kind = callback if isinstance(callback, type) else type(callback)
    return f"{kind.__module__}.{kind.__qualname__}"


def _what_failed(callback: object, hook: str) -> str:
    """A user's callback by its import path; one of ours as a part of the trainer, since the user has not set it."""
    kind = type(callback)
    if kind.__module__.startswith("dist_trainer."):
        return f"dist_trainer's own {kind.__name__} ({hook})"
    return f"{_name(callback)}.{hook}"
