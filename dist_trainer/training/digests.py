"""Digests of the weights during training: the same number for the same weights, whatever the ranks, strategy or restarts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from dist_trainer.checkpoint.digest import weights_digest
from dist_trainer.checkpoint.host_copy import HostCopy, PinnedMemory, start_host_copy
from dist_trainer.models.weights import make_weight_namer
from dist_trainer.optim.evaluation_weights import evaluation_weights
from dist_trainer.parallel.registry import unwrap
from dist_trainer.training.callbacks import LineWriter
from dist_trainer.training.step import StepResult

log = logging.getLogger(__name__)


class WeightDigests:
    """A callback that logs a line of kind "digest" every `every_steps` steps and after the last one, of the weights that a
    checkpoint of that step holds: with an optimizer that has others for evaluation, those.

    Rank 0 copies them to host memory; a thread hashes the copy while training continues. It is also the trainer's way to its
    `lines`, so that a checkpoint becomes visible only after the digests of the steps before it are logged: a run that resumes
    there would not log them again.
    """

    def __init__(self, every_steps: int, model: nn.Module, lines: LineWriter) -> None:
        """`model`: the module itself, not wrapped."""
        self.every_steps, self._lines = every_steps, lines
        self._as_saved: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = make_weight_namer(model)
        self._pinned = PinnedMemory()
        self._thread: threading.Thread | None = None

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line."""
        self._lines.log(line)

    def sync(self) -> None:
        """Return when the lines so far survive a power cut, those of digests that are being computed among them."""
        self._wait()
        self._lines.sync()

    def on_fit_start(self, trainer: Any) -> None:
        """If the run was killed at this step before its digest was logged, log it now; a tracker drops what it has."""
        self._start_if_due(trainer, trainer.progress.step)

    def on_step_end(self, trainer: Any, result: StepResult) -> None:
        """Start a digest if it is due."""
        self._start_if_due(trainer, result.step)

    def close(self, trainer: Any, result: object) -> None:
        """Return when the last digest is logged."""
        self._wait()

    def _start_if_due(self, trainer: Any, step: int) -> None:
        is_due = step > 0 and (step % self.every_steps == 0 or step == trainer.max_steps)
        if not is_due or not trainer.world.is_main:
            return
        self._wait()  # only if hashing takes longer than `every_steps` steps: no digest is left out, and one copy is held
        with evaluation_weights(trainer.optimizer):
            copy = self._copy(trainer, step)
        if copy is not None:
            self._thread = threading.Thread(target=self._log_digest, args=(trainer, step, copy), name="weight-digest")
            self._thread.start()

    def _copy(self, trainer: Any, step: int) -> HostCopy | None:
        try:
            return start_host_copy(unwrap(trainer.model).state_dict(), pinned=self._pinned)
        except Exception as error:  # the host may have no room for it
            _warn(step, error)
            return None

    def _log_digest(self, trainer: Any, step: int, copy: HostCopy) -> None:
        try:
            digest = weights_digest(self._as_saved(copy.wait()).items())
            trainer.log({"kind": "digest", "step": step, "digest": digest})
        except Exception as error:
            _warn(step, error)

    def _wait(self) -> None:
        thread = self._thread
        if thread is not None:
            thread.join()


def _warn(step: int, error: Exception) -> None:
    log.warning("step %d: no digest of the weights (%s: %s); training continues", step, type(error).__name__, error)
