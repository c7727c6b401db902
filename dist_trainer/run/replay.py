"""A replay: steps of a run once more, from a checkpoint, on the ranks of this process. Nothing is saved; what it finds are
lines as in metrics.jsonl, of every step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from dist_trainer.checkpoint.digest import combined_digest, tensor_digests
from dist_trainer.checkpoint.folders import step_of
from dist_trainer.checkpoint.state import read_training_state
from dist_trainer.config.loading import dump_config
from dist_trainer.config.schema import ProfileConfig, TrackingConfig, TrainingConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, StoppedError, counted
from dist_trainer.huggingface.weights import read_hf_weights
from dist_trainer.models.weights import make_weight_namer, make_weight_saver
from dist_trainer.optim.evaluation_weights import evaluation_weights
from dist_trainer.parallel.registry import unwrap
from dist_trainer.run.build import build_trainer
from dist_trainer.run.configure import load_config
from dist_trainer.run.memory import explain_out_of_memory
from dist_trainer.run.resume import ResumeState
from dist_trainer.storage.files import remove, replace_file
from dist_trainer.tracking.environment import describe_environment
from dist_trainer.training.step import StepResult
from dist_trainer.training.trainer import Trainer
from dist_trainer.training.validation import ValidationResult

PLAN_FILE, CONFIG_FILE, WEIGHTS_FILE = "plan.json", "config.yaml", "weights.safetensors"
"""File in the scratch folder of a replay."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to replay."""

    config: TrainingConfig
    """The run's config, with its micro-batch size filled in."""
    first: int
    last: int
    """The steps to compare; those between the checkpoint and `first` are replayed too."""
    scratch: Path
    """A folder on this machine for what the replay must write."""
    checkpoint: Path | None = None
    """The checkpoint to start from; None: step 0."""
    saved: tuple[Path, ...] = ()
    """Checkpoints whose weights are compared with the replay's."""
    weights_of: int = 0
    """The step whose weights are kept in the scratch folder; 0: none."""

    def write(self) -> None:
        """Write it into its scratch folder, for `read`."""
        paths = {"checkpoint": self.checkpoint and str(self.checkpoint), "saved": [str(path) for path in self.saved]}
        numbers = {"first": self.first, "last": self.last, "weights_of": self.weights_of}
        (self.scratch / PLAN_FILE).write_text(json.dumps({**numbers, **paths}), encoding="utf-8")
        (self.scratch / CONFIG_FILE).write_text(dump_config(self.config), encoding="utf-8")

    @staticmethod
    def read(scratch: Path) -> Plan:
        """The plan in the folder `scratch`."""
        values = json.loads((scratch / PLAN_FILE).read_text(encoding="utf-8"))
        checkpoint, saved = values.pop("checkpoint"), values.pop("saved")
        config = load_config(["--config", str(scratch / CONFIG_FILE)], trains=False)
        paths = {"checkpoint": checkpoint and Path(checkpoint), "saved": tuple(map(Path, saved))}
        return Plan(config, scratch=scratch, **values, **paths)


def without_traces(config: TrainingConfig, scratch: Path) -> TrainingConfig:
    """`config` without the keys that change no number: those that write to a run's folder or elsewhere, and the sentinel's."""
    tracking = TrackingConfig(wandb="disabled", sample_tokens=0, log_every_steps=config.tracking.log_every_steps)
    distributed = replace(config.distributed, sentinel_every_steps=0)
    return replace(config, output_dir=str(scratch), tracking=tracking, profile=ProfileConfig(), distributed=distributed)


def replay(plan: Plan, world: DistributedContext) -> list[Line]:
    """Replay the steps of `plan`. The lines found, on rank 0: of each step `train` (loss, grad_norm) and `digest` (of the
    weights, and of each tensor); `validation` (loss); `checkpoint` (the first tensor that differs, or null, and by how much).
    The first line, of kind `replay`, says where this was.

    For all ranks; raises ConfigError if training ends before the last step, CheckpointError, StoppedError after a signal.
    """
    start = ResumeState()
    if plan.checkpoint is not None:
        state = read_training_state(plan.checkpoint)
        progress = state.pop("progress")
        start = ResumeState(plan.checkpoint, progress, metadata=state)
    config = without_traces(plan.config, plan.scratch)
    recorder = Recorder(plan, world)
    with explain_out_of_memory(config, world):
        trainer = build_trainer(config, world, start, callbacks=[recorder])
    if trainer.max_steps < plan.last:
        raise ConfigError(f"--steps: up to {plan.last}, but training ends after {counted(trainer.max_steps, 'step')}")
    with explain_out_of_memory(config, world, trainer):
        result = trainer.fit()
    if result.state != "finished":
        raise StoppedError(result.signal_number)
    return recorder.lines


@dataclass
class Recorder:
    """A callback that records the result of each step, and stops after the last one."""

    plan: Plan
    world: DistributedContext
    lines: list[Line] = field(default_factory=list)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Record the machine, device and versions."""
        environment = describe_environment(trainer.world) if self.world.is_main else {}
        reduction = type(trainer.reduction).__name__
        self._add("replay", trainer.progress.step, ranks=self.world.world_size, reduction=reduction, environment=environment)

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Record the numbers and weights of the step."""
        metrics = result.metrics(trainer.world)
        if result.step >= self.plan.last:
            trainer.stop("all steps to compare are replayed")
        if result.step < self.plan.first:
            return
        self._add("train", result.step, loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        with trainer.between_steps(), evaluation_weights(trainer.optimizer):
            if not self.world.is_main:
                return
            weights = named_as_saved(unwrap(trainer.model))
            tensors = tensor_digests(weights.items())
            self._add("digest", result.step, digest=combined_digest(tensors), tensors=tensors)
            if result.step == self.plan.weights_of:
                on_host = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
                save_file(on_host, self.plan.scratch / WEIGHTS_FILE)
            for folder in self.plan.saved:
                if step_of(folder) == result.step:
                    tensor, difference = self._compare(trainer, folder)
                    self._add("checkpoint", result.step, tensor=tensor, difference=difference)

    def on_validation_end(self, trainer: Trainer, result: ValidationResult) -> None:
        """Record the loss."""
        if trainer.progress.step >= self.plan.first:
            self._add("validation", trainer.progress.step, loss=result.loss)

    def _add(self, kind: str, step: int, **values: Any) -> None:
        if self.world.is_main:
            self.lines.append({"kind": kind, "step": step, **values})

    def _compare(self, trainer: Trainer, saved: Path) -> tuple[str | None, float]:
        """Compare with a checkpoint's files: they use Hugging Face's names, whatever the model calls its parameters."""
        own = self.plan.scratch / saved.name
        own.mkdir()
        model = unwrap(trainer.model)
        make_weight_saver(model)(model.state_dict(), own)
        try:
            return first_difference(dict(read_hf_weights(saved)), dict(read_hf_weights(own)))
        finally:
            remove(own)


def first_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str | None, float]:
    """The first tensor of `ours` whose bits differ in `theirs`, and the largest difference between their elements; a tensor
    that only one of them has, or of another shape or type, differs by infinity. None and 0 if all are the same.
    """
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            return name, float("inf")
        if tensor_digests([(name, one)]) != tensor_digests([(name, other)]):
            return name, float((one.double() - other.double()).abs().nan_to_num(float("inf")).max())
    return None, 0.0


def named_as_saved(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model`, by their names in a checkpoint."""
    return dict(make_weight_namer(model)(model.state_dict()))


def write_lines(lines: list[Line], file: Path) -> None:
    """Write one JSON object per line; NaN and infinity as Python's json writes them."""
    replace_file(file, [f"{json.dumps(line)}\n".encode() for line in lines], durable=False)


def read_lines(file: Path) -> list[Line]:
    """Read what `write_lines` wrote."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
