"""The state of a run at a step (weights, optimizer, scaler and progress), saved to and loaded from a folder's files.

Tensors go to safetensors, everything else to JSON, so that opening a checkpoint cannot run code. The order of data and the
dropout masks are pure functions of (seed, step), so the step is enough to restore both, on any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_trainer.checkpoint.host_copy import PinnedMemory, to_host
from dist_trainer.checkpoint.optimizer_state import (
    GROUPS,
    OPTIMIZER_FILE,
    SEPARATOR,
    STATE_FILE,
    group_values,
    restore_optimizer,
    state_tensors,
    state_values,
)
from dist_trainer.errors import CheckpointError
from dist_trainer.storage.manifest import read_json, verify


class Validated(NamedTuple):
    """Validation loss after a step. The smallest is the best: the lowest loss, and of equal ones the earliest."""

    loss: float
    """Finite, in nats per token."""
    step: int


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Finished optimizer steps; the next one uses global batch number `step`."""
    target_tokens: int = 0
    """Tokens trained on so far, over all ranks."""
    validated_step: int = 0
    """Step of the last completed validation."""
    validation_loss: float | None = None
    """Its loss, in nats per token."""
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss so far, and its step, among steps whose checkpoints were saved or are about to be."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    """Updates skipped because gradients were not finite: in total, and since the last one that was not skipped."""
    pending_sample_step: int = 0
    """Step whose text sample was interrupted by a signal; 0: none."""

    @property
    def has_pending_sample(self) -> bool:
        """Whether the sample of this step is still to be made."""
        return 0 < self.pending_sample_step == self.step

    @property
    def best(self) -> Validated | None:
        """`best_loss` and `best_step`; None before the first finite validation loss."""
        return None if self.best_step is None or self.best_loss is None else Validated(self.best_loss, self.best_step)

    @best.setter
    def best(self, best: Validated | None) -> None:
        self.best_loss, self.best_step = (None, None) if best is None else (best.loss, best.step)

    @property
    def is_best(self) -> bool:
        """Whether the current step is the best one so far."""
        return self.best_step == self.step

    @property
    def validated(self) -> Validated | None:
        """Validation of the current step; None if there was none, or if its loss is not finite, which cannot be compared."""
        loss = self.validation_loss
        is_known = self.validated_step == self.step and loss is not None and math.isfinite(loss)
        return Validated(loss, self.step) if is_known and loss is not None else None

    def record_step(self, target_tokens: int) -> None:
        """Count one more finished step, which trained on `target_tokens`."""
        self.step += 1
        self.target_tokens += target_tokens

    def record_validation(self, loss: float) -> None:
        """Record the validation loss of the current step; it is the best one if it is lower than all before."""
        self.validated_step, self.validation_loss = self.step, loss
        self.best = min((entry for entry in (self.best, self.validated) if entry is not None), default=None)

    def record_sample(self, *, was_interrupted: bool) -> None:
        """Record whether a signal interrupted the text sample of the current step, which then is still pending."""
        self.pending_sample_step = self.step if was_interrupted else 0


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run's state in host memory, unaffected by further training."""

    weights: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    optimizer_values: dict[str, float]
    scaler: dict[str, Any]
    progress: Progress
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else to save: the config, the number of ranks, fingerprints of the data."""
    untrained: frozenset[str] = frozenset()
    """Names in `weights` that no optimizer step changes: buffers and frozen parameters."""
    optimizer_groups: list[dict[str, Any]] | None = None
    """Values of each parameter group; settings among them may be infinite."""

    def non_finite(self) -> str | None:
        """The first of the trained weights and the optimizer's state that contains NaN or infinity; None if all are finite.

        Buffers and frozen parameters are ignored: they may be infinite for a good reason, such as a mask of -inf.
        """
        weights = {name: tensor for name, tensor in self.weights.items() if name not in self.untrained}
        for name, value in {**weights, **self.optimizer_tensors, **self.optimizer_values}.items():
            if isinstance(value, Tensor):
                finite = not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
            else:
                finite = not isinstance(value, float) or math.isfinite(value)
            if not finite:
                return name.replace(SEPARATOR, ": optimizer's ")
        return None


def take_snapshot(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    scaler: dict[str, Any],
    progress: Progress,
    metadata: Mapping[str, Any],
    training_weights: Mapping[nn.Parameter, Tensor] | None = None,
    is_last: bool = False,
    pinned: PinnedMemory | None = None,
) -> Snapshot:
    """Copy everything to host memory. Training waits only for this when a checkpoint is saved.

    `training_weights`: of the parameters that currently have their evaluation weights and will be restored. `is_last`: no step
    follows, so tensors in host memory are not copied, and the end of a run needs no memory for a second state. Copies from a
    GPU use `pinned` unless another snapshot does.
    """
    weights = model.state_dict()
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    tensors = state_tensors(optimizer, model, training_weights)
    on_host, uses_pinned = to_host({**tensors, **weights}, copies=not is_last or bool(training_weights), pinned=pinned)
    snapshot = Snapshot(
        weights={name: on_host[name] for name in weights},
        optimizer_tensors={name: on_host[name] for name in tensors},
        optimizer_values=state_values(optimizer, model),
        scaler=scaler,
        progress=Progress(**asdict(progress)),
        metadata=metadata,
        untrained=frozenset(weights.keys() - trained),
        optimizer_groups=group_values(optimizer),
    )
    if pinned is not None and uses_pinned:
        pinned.lend_to(snapshot)
    return snapshot


def write_training_state(snapshot: Snapshot, folder: Path) -> None:
    """Write everything except the weights into `folder`."""
    save_file(snapshot.optimizer_tensors, folder / OPTIMIZER_FILE)
    state = {
        "progress": asdict(snapshot.progress),
        "scaler": snapshot.scaler,
        "optimizer_values": snapshot.optimizer_values,
        GROUPS: snapshot.optimizer_groups,
        "random_state": "derived from (seed, step, micro-batch): nothing to save",
        **snapshot.metadata,
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def read_training_state(folder: Path) -> dict[str, Any]:
    """The JSON part of the state in `folder`, with `progress` as a Progress. Raises CheckpointError if it is not one."""
    state = read_json(folder / STATE_FILE)
    try:
        old_name = {"owed_sample_step": "pending_sample_step"}  # before version 0.1
        progress = Progress(**{old_name.get(name, name): value for name, value in state["progress"].items()})
        sections = [state[name] for name in ("scaler", "optimizer_values")] + [state.get("config", {})]
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} is not the state of a run: {error}") from error
    if not _has_its_types(progress) or not all(isinstance(section, dict) for section in sections):
        raise CheckpointError(f"{folder / STATE_FILE} is not the state of a run: its values are not of their types")
    return {**state, "progress": progress}


def _has_its_types(progress: Progress) -> bool:
    values = asdict(progress)
    losses = (values.pop("validation_loss"), values.pop("best_loss"))
    counts = [0 if value is None and name == "best_step" else value for name, value in values.items()]
    return all(type(count) is int and count >= 0 for count in counts) and all(type(x) in (float, type(None)) for x in losses)


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    load_weights: Callable[[nn.Module, Path], None],
    load_scaler: Callable[[dict[str, Any]], None],
    verifies: bool = True,
) -> dict[nn.Parameter, Tensor]:
    """Restore weights, optimizer and scaler from the checkpoint in `folder`; returns the training weights of those parameters
    that were saved with their evaluation weights. Raises CheckpointError.

    `verifies`: compare the files with their digests again, after reading them. They were valid when the checkpoint was chosen,
    but a disk need not return the same bits twice.
    """
    try:
        load_weights(model, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its weights do not fit this model ({error})") from error
    try:
        state = read_training_state(folder)
        training_weights = restore_optimizer(optimizer, model, folder, state)
        load_scaler(state["scaler"])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its optimizer state does not fit this run ({error!r})") from error
    if verifies:
        verify(folder)
    return training_weights
