"""`Trainer`: the loop and the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dist_trainer.checkpoint.folders import resume_point
from dist_trainer.checkpoint.manager import Checkpoints
from dist_trainer.checkpoint.optimizer_state import FirstStepCheck
from dist_trainer.checkpoint.state import Progress, Validated
from dist_trainer.config.rules import check_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch, DeviceCopy
from dist_trainer.data.sampler import GlobalOrderSampler, accumulation_steps
from dist_trainer.data.token_bytes import TokenBytes
from dist_trainer.distributed.beats import Phase
from dist_trainer.distributed.collectives import PendingSum, broadcast_object, run_on_rank0
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, StoppedError
from dist_trainer.models.evaluation_mode import evaluation_mode
from dist_trainer.models.loss import model_loss
from dist_trainer.optim.evaluation_weights import evaluation_weights, training_weights
from dist_trainer.optim.schedules import build_schedule, set_learning_rates, total_steps
from dist_trainer.parallel.ddp import Buffers
from dist_trainer.parallel.reduction import build_reduction
from dist_trainer.parallel.registry import compute_loss, unwrap
from dist_trainer.tracking.throughput import Throughput
from dist_trainer.tracking.tracker import TrackerList
from dist_trainer.training.callbacks import CallbackList, LineWriter, MetricsLogger
from dist_trainer.training.garbage_collection import GarbageCollector
from dist_trainer.training.nonfinite import DivergenceWatch
from dist_trainer.training.precision import Precision
from dist_trainer.training.precompile import precompile
from dist_trainer.training.profiler import Profiler
from dist_trainer.training.saving import TrainingResult, TrainingState, finalize_checkpoint, fit_result, stop_after_failed_saves
from dist_trainer.training.sentinel import build_take_step
from dist_trainer.training.step import StepInput, StepResult, clip_gradients, seed_dropout, trace_range
from dist_trainer.training.validation import LossFunction, evaluate, validation_is_due


class Trainer:
    """Trains `model` on `train_data`: any module, and loaders made by `create_dataloaders`."""

    def __init__(
        self,
        config: TrainingConfig,
        world: DistributedContext,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        train_data: DataLoader,
        validation_data: DataLoader | None = None,
        precision: Precision | None = None,
        loss_function: LossFunction = model_loss,
        step_context: Callable[[], AbstractContextManager[None]] = nullcontext,
        checkpoints: Checkpoints | None = None,
        tracker: LineWriter | None = None,
        callbacks: Sequence[object] = (),
        token_bytes: TokenBytes | None = None,
        flops_per_token: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is on world.device, wrapped by `parallelize`; `optimizer` updates its parameters.

        `loss_function(model, batch)` returns the sum of the batch's token losses. `step_context` makes a context for each
        forward and backward pass. `flops_per_token` is for MFU, `token_bytes` for bits per byte; `metadata` is saved with
        checkpoints. `checkpoints` and `tracker` are used on rank 0 only. `callbacks`: objects with some of the methods of
        `Callback`, called on every rank in this order.
        """
        check_config(config)
        if not isinstance(train_data.sampler, GlobalOrderSampler):
            raise ConfigError("train_data must come from create_dataloaders, which accepts any dataset")
        self.config, self.world, self.model, self.optimizer = config, world, model, optimizer
        self.train_data, self.validation_data, self.sampler = train_data, validation_data, train_data.sampler
        self.precision = precision or Precision("fp32", world.device)
        self.loss_function, self.step_context = loss_function, step_context
        self.checkpoints = checkpoints if checkpoints is not None and world.is_main else Checkpoints()
        self.tracker: LineWriter = tracker if tracker is not None and world.is_main else TrackerList()
        self.callbacks = CallbackList(
            [MetricsLogger(config.tracking.log_every_steps), Profiler(config.profile.steps), *callbacks]
        )
        self.progress = Progress()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.accumulation_steps = accumulation_steps(config.batch, world.world_size)
        self.reduction = build_reduction(config.distributed.reduction, model, world, micro_batches=self.accumulation_steps)
        self.max_steps = self.last_step = total_steps(config.train, self.sampler.steps_per_epoch)
        policy = "skip" if self.precision.name == "fp16" else config.train.on_non_finite
        self.divergence = DivergenceWatch(policy, max_skipped_steps=config.train.max_skipped_steps, device=world.device)
        self.throughput = Throughput(world, dtype=self.precision.name, flops_per_token=flops_per_token)
        self._learning_rate_factor = build_schedule(config.schedule, self.max_steps)
        self._buffers, self._garbage = Buffers(unwrap(model), world), GarbageCollector()
        self._state = TrainingState(unwrap(model), optimizer, self.precision, metadata or {})
        self._device_copy, self._token_bytes = DeviceCopy(world.device), token_bytes
        self._is_saved, self._is_over, self._stop_reason = True, False, ""
        self._resumed_from: Path | None = None
        self._take_step = build_take_step(self)

    def fit(self) -> TrainingResult:
        """Train to `max_steps`, or until `stop` is called or a rank receives a stop signal; then save.

        Raises on all ranks at the same step: TrainingDivergedError, SavingFailedError, CallbackError, and, after saving,
        LauncherLostError. When it returns or raises, no checkpoint is still being written.
        """
        result = None
        try:
            with training_weights(self.optimizer):
                result = self._fit()
        except BaseException as error:
            self.checkpoints.wait()
            self.callbacks.call("on_error", self, error)
            raise
        finally:
            self.callbacks.call("close", self, result)
            self.callbacks.log_error()
        self.callbacks.raise_error(self)
        return result

    def _fit(self) -> TrainingResult:
        pending_sample = self.progress.has_pending_sample
        with self.world.stop_request.listen(), self._garbage:
            try:
                self.callbacks.call("on_fit_start", self)
                self.callbacks.raise_error(self)
                self._mark("warming up")
                saves, model = broadcast_object(self.checkpoints.saves, self.world), unwrap(self.model)
                first_step_check = FirstStepCheck(self.optimizer, model, saves=saves, resumed=self._resumed_from)
                precompile(self)
            except StoppedError as stopped:
                return TrainingResult("preempted", self.progress, stopped.signal_number)
            if self._validate_if_due() or pending_sample:  # a signal had interrupted one of them
                self._save()
            # After precompile, which reads batches too: a loader with persistent workers has only one iterator.
            self.sampler.seek(self.progress.step)
            batches = iter(self.train_data)
            self.throughput.start(step=self.progress.step, tokens=self.progress.target_tokens)
            upcoming = self._fetch(batches)
            while (target_tokens := self._agree(upcoming)) is not None:
                self._mark("training")
                self._device_copy.wait(upcoming.micro_batches)
                with trace_range(f"step {self.progress.step + 1}"):
                    result = self._take_step(upcoming.micro_batches, target_tokens)
                self._is_saved = False
                first_step_check.after_step()
                self.divergence.observe(result)
                self._mark("reading data")
                upcoming = self._fetch(batches)  # while the device still computes the step
                self.callbacks.call("on_step_end", self, result)
                is_best = self._validate_if_due() and self.progress.is_best
                if is_best or self._save_is_due():
                    self._save()
            self._is_over = True
            if not self._is_saved:
                self._save()
        self._mark("saving")
        finalize_checkpoint(self.checkpoints, self.world, save_again=self._save)
        self.progress.best = self._best_saved()
        self._report_checkpoints()
        self.callbacks.raise_error(self)
        return fit_result(self.progress, self.world, has_finished=self.has_finished, stop_reason=self._stop_reason)

    def train_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """One update on loss = (sum of token losses) / target_tokens, over all ranks and micro-batches."""
        step, losses = self.progress.step, []
        weight = self.reduction.divisor / max(1, target_tokens)
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            seed_dropout(self.config.seed, step, block=self.world.rank * self.accumulation_steps + index)
            with self.step_context(), self.reduction.micro_batch(index):
                losses.append(self.forward_backward(batch, weight, exchanges=is_last))
            self._garbage.collect()

        self._mark("updating")
        self.precision.unscale(self.optimizer)
        with trace_range("clip gradients"):
            grad_norm = clip_gradients(self.parameters, self.config.optim.max_grad_norm)
        learning_rate = set_learning_rates(self.optimizer, self._learning_rate_factor(step))
        with trace_range("optimizer"):
            self.precision.step(self.optimizer, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:  # some may not be in the optimizer; their gradients would accumulate over steps
            parameter.grad = None
        self._buffers.share()
        self.progress.record_step(target_tokens)
        return StepResult(step + 1, losses, grad_norm, learning_rate, target_tokens, self.progress.target_tokens)

    def forward_backward(self, batch: Batch, weight: float, *, exchanges: bool) -> Tensor:
        """The sum of the batch's token losses; adds the gradients of `weight` times this sum to the parameters' gradients.

        `exchanges`: whether this backward pass exchanges gradients, and so waits for other ranks.
        """
        with trace_range("forward"), self.precision.autocast():
            loss_sum = compute_loss(self.model, self.loss_function, batch)
        self._mark("backward" if exchanges else "training")
        with trace_range("backward"):
            self.precision.backward(loss_sum, weight)
        return loss_sum.detach().float()

    def _fetch(self, batches: Iterator[Batch]) -> StepInput:
        """The next step's micro-batches, on their way to the device."""
        micro_batches = []
        with self.throughput.waiting_for_data, trace_range("data"):
            for _ in range(self.accumulation_steps):
                self._mark("reading data")
                micro_batches.append(next(batches))
            return StepInput(self._device_copy.start(micro_batches), sum(batch.num_targets() for batch in micro_batches))

    def _agree(self, upcoming: StepInput) -> int | None:
        """The next step's target tokens over all ranks; None if training ends here. Raises on all ranks what ends it on any.

        One small sum in host memory tells all ranks what they must know about each other before a step.
        """
        flags = (
            bool(self.world.stop_request),
            bool(self._stop_reason),
            self.callbacks.error is not None,
            self.checkpoints.has_given_up,
            bool(self.checkpoints.published),
        )
        sums = PendingSum([upcoming.target_tokens, *map(int, flags)], self.world).wait()
        target_tokens, stop_requested, stop_called, callback_failed, saves_failed, has_published = sums
        if callback_failed:
            self.callbacks.raise_error(self)
        if has_published:
            self._report_checkpoints()
        if self.progress.step >= self.max_steps:
            return None
        if saves_failed:
            stop_after_failed_saves(self.checkpoints, self.world, self.config.checkpoint)
        if stop_called and not stop_requested:
            self.last_step = self.progress.step  # makes a validation due
            self._validate_if_due()
        return None if stop_requested or stop_called else target_tokens

    def _validate_if_due(self) -> bool:
        """Validate after the current step, if due and not done yet; returns whether a validation was completed."""
        step = self.progress.step
        if self.validation_data is None or self.progress.validated_step == step:
            return False
        if not validation_is_due(self.config.validation, step, max_steps=self.last_step, epoch_of=self.sampler.epoch_of):
            return False
        with self.between_steps():
            with self.evaluating() as model, trace_range("validation"):
                result = evaluate(
                    model,
                    self.validation_data,
                    num_blocks=self.validation_data.sampler.num_blocks,  # type: ignore[attr-defined]
                    world=self.world,
                    precision=self.precision,
                    loss_function=self.loss_function,
                    token_bytes=self._token_bytes,
                    interrupted=lambda: bool(self.world.stop_request),
                )
            if result is None:
                return False
            self.progress.best = self._best_saved()  # a save may have failed meanwhile
            self.progress.record_validation(result.loss)
            self._is_saved = False
            self.callbacks.call("on_validation_end", self, result)
        return True

    def _best_saved(self) -> Validated | None:
        """`progress.best`, or, if its save has failed (which only rank 0 knows), the best that is saved."""
        return broadcast_object(self.checkpoints.best(self.progress.best), self.world)

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return every > 0 and self.progress.step % every == 0

    def _save(self) -> None:
        with self.between_steps(), self.throughput.saving, trace_range("checkpoint"):
            self._mark("saving")
            progress, watch = self.progress, self.divergence
            progress.skipped_steps, progress.skipped_in_a_row = watch.skipped_steps, watch.skipped_in_a_row
            is_last = self._is_over or progress.step >= self.last_step
            make_snapshot = partial(self._state.snapshot, progress, is_last=is_last)
            self.checkpoints.save(make_snapshot, is_best=progress.is_best, before_publish=self.tracker.sync)
        self._is_saved = True

    def _report_checkpoints(self) -> None:
        for step, folder in broadcast_object(self.checkpoints.take_published(), self.world):
            self.callbacks.call("on_checkpoint", self, step, folder)

    def _mark(self, phase: Phase) -> None:
        self.world.heartbeat.mark(phase, step=self.progress.step)

    def stop(self, reason: str) -> None:
        """End training after this step on all ranks, as finished: validate and save. One rank calling it is enough."""
        self._stop_reason = reason or "stopped by a callback"

    def log(self, line: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl at the current step, on rank 0: its `kind`, and numbers and strings by name."""
        self.tracker.log({"kind": line["kind"], "step": self.progress.step, **line, "time": time.time()})

    @contextmanager
    def between_steps(self) -> Generator[None]:
        """Time inside does not count as training time. First checks all steps so far; may raise TrainingDivergedError."""
        if self.throughput.paused.is_open:
            yield
            return
        self.divergence.drain()  # waits for the last step on the GPU, which is training time
        with self.throughput.paused, self._garbage.automatic():
            self._mark("in a callback")  # unless the code inside marks another phase
            yield

    @contextmanager
    def evaluating(self) -> Generator[nn.Module]:
        """Between steps, the unwrapped model to evaluate: with evaluation weights, in evaluation mode, without gradients."""
        model, buffers = unwrap(self.model), self._buffers.unchanged()
        with self.between_steps(), evaluation_weights(self.optimizer), evaluation_mode(model), buffers, torch.no_grad():
            yield model

    @property
    def has_finished(self) -> bool:
        """Whether nothing is left to do: no step, no last validation, no text sample that a signal interrupted."""
        validated = self.validation_data is None or self.progress.validated_step == self.progress.step
        return self.progress.step >= self.last_step and validated and not self.progress.has_pending_sample

    def resume(self, checkpoints: Path) -> bool:
        """Continue from the newest valid checkpoint in the folder `checkpoints`; whether there is one. For all ranks.

        Raises CheckpointError if none is valid, or if it holds another model's state.
        """
        found = run_on_rank0(self.world, lambda: resume_point(checkpoints, keep_last=self.config.checkpoint.keep_last))
        if found is not None:
            self.restore(*found)
        return found is not None

    def restore(self, checkpoint: Path, progress: Progress) -> None:
        """Continue from `checkpoint`, saved after `progress`. For all ranks; raises CheckpointError on all of them."""
        self._state.restore(checkpoint, self.world)
        self.progress, self._resumed_from = progress, checkpoint
        self.checkpoints.set_best(progress.best)
        self.divergence.skipped_steps, self.divergence.skipped_in_a_row = progress.skipped_steps, progress.skipped_in_a_row
