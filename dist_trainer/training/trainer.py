"""`Trainer`: the loop and the step. It receives finished objects and builds none."""

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
from dist_trainer.optim.registry import init_optimizer_state
from dist_trainer.optim.schedules import build_schedule, set_learning_rates, total_steps
from dist_trainer.parallel.buffers import Buffers
from dist_trainer.parallel.registry import compute_loss, gradient_sync, unwrap
from dist_trainer.tracking.throughput import Throughput
from dist_trainer.tracking.tracker import TrackerList
from dist_trainer.training.callbacks import CallbackList, LineWriter, MetricsLogger
from dist_trainer.training.garbage_collection import GarbageCollector
from dist_trainer.training.nonfinite import DivergenceWatch
from dist_trainer.training.precision import Precision
from dist_trainer.training.precompile import precompile
from dist_trainer.training.profiler import Profiler
from dist_trainer.training.saving import TrainingResult, TrainingState, finalize_checkpoint, fit_result, stop_after_failed_saves
from dist_trainer.training.step import StepInput, StepResult, clip_gradients, fetch_step, phase, seed_dropout
from dist_trainer.training.validation import LossFunction, evaluate, validation_is_due


class Trainer:
    """Trains `model` on `train_data`; any module, and any loaders that `create_dataloaders` made."""

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
        """`model` is on world.device, wrapped by `parallelize`; `optimizer` is over its parameters.

        `loss_function(model, batch)` gives the sum of the batch's token losses. `step_context` makes a context for each forward
        and backward pass. `flops_per_token` is for MFU, `token_bytes` for bits per byte, `metadata` is saved with checkpoints.
        `checkpoints` and `tracker` are used on rank 0 only. `callbacks`: objects with some of the methods of `Callback`, called
        on every rank in this order.
        """
        check_config(config)
        self.config, self.world = config, world
        self.model, self.optimizer, self.step_context = model, optimizer, step_context
        self.train_data, self.validation_data = train_data, validation_data
        self.precision, self.loss_function = precision or Precision("fp32", world.device), loss_function
        self.checkpoints = checkpoints if checkpoints is not None and world.is_main else Checkpoints()
        self.tracker: LineWriter = tracker if tracker is not None and world.is_main else TrackerList()
        self.state = TrainingState(unwrap(model), optimizer, self.precision, metadata or {})
        profilers = [] if config.profile.steps is None else [Profiler(config.profile.steps)]
        self.callbacks = CallbackList([MetricsLogger(config.tracking.log_every_steps), *profilers, *callbacks])
        self.progress, self.token_bytes = Progress(), token_bytes
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers, self.garbage = Buffers(unwrap(model), world), GarbageCollector()
        self.accumulation_steps = accumulation_steps(config.batch, world.world_size)
        if not isinstance(train_data.sampler, GlobalOrderSampler):
            raise ConfigError("train_data must come from create_dataloaders, which accepts any dataset")
        self.sampler = train_data.sampler
        self.device_copy = DeviceCopy(world.device)
        self.max_steps = self.last_step = total_steps(config.train, self.sampler.steps_per_epoch)
        self.learning_rate_factor = build_schedule(config.schedule, self.max_steps)
        skipping = "skip" if self.precision.name == "fp16" else config.train.on_non_finite
        self.divergence = DivergenceWatch(skipping, max_skipped_steps=config.train.max_skipped_steps, device=world.device)
        self.throughput = Throughput(world, dtype=self.precision.name, flops_per_token=flops_per_token)
        self._is_saved, self._is_over, self._stop_reason = True, False, ""
        self._resumed: Path | None = None

    def fit(self) -> TrainingResult:
        """Train to `max_steps`, until `stop` is called, or until a signal on any rank asks to stop; all end in a checkpoint.

        Raises TrainingDivergedError, SavingFailedError, CallbackError, and LauncherLostError after saving: on all ranks at the
        same step. Nothing is being written any more when it returns or raises.
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
        with self.world.stop_request.listen(), self.garbage:
            try:
                self.callbacks.call("on_fit_start", self)
                self.callbacks.raise_error(self)
                self._at("warming up")
                self.precompile()
            except StoppedError as stopped:
                return TrainingResult("preempted", self.progress, stopped.signal_number)
            if self._validate_if_due() or pending_sample:  # a signal had interrupted it
                self._save()
            # After precompile, which reads too: loaders with persistent workers have only one iterator.
            self.sampler.seek(self.progress.step)
            batches = iter(self.train_data)
            self.throughput.start(step=self.progress.step, tokens=self.progress.target_tokens)
            upcoming = self._fetch(batches)
            while (target_tokens := self._agree(upcoming)) is not None:
                self._at("training")
                self.device_copy.wait(upcoming.micro_batches)
                with phase(f"step {self.progress.step + 1}"):
                    result = self.train_step(upcoming.micro_batches, target_tokens)
                self._is_saved = False
                self.first_step_check.after_step()
                self.divergence.observe(result)
                self._at("reading data")
                upcoming = self._fetch(batches)
                self.callbacks.call("on_step_end", self, result)
                self._validate_and_save()
            self._is_over = True
            with self.between_steps():
                if not self._is_saved:
                    self._save()
        self._at("saving")
        finalize_checkpoint(self.checkpoints, self.world, save_again=self._save)
        self.progress.best = self._best_saved()
        self._report_checkpoints()
        self.callbacks.raise_error(self)
        return fit_result(self.progress, self.world, has_finished=self.has_finished, stop_reason=self._stop_reason)

    def train_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """One update on loss = (sum of token losses) / target_tokens, over all ranks and micro-batches."""
        step, losses = self.progress.step, []
        weight = self.world.world_size / max(1, target_tokens)  # times the ranks, as they average their gradients
        for index, batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            seed_dropout(self.config.seed, step, block=index * self.world.world_size + self.world.rank)
            with self.step_context(), gradient_sync(self.model, enabled=is_last):
                losses.append(self._backpropagate(batch, weight, then="backward" if is_last else "training"))
            self.garbage.collect()

        self._at("updating")
        self.precision.unscale(self.optimizer)
        with phase("clip gradients"):
            grad_norm = clip_gradients(self.parameters, self.config.optim.max_grad_norm)
        learning_rate = set_learning_rates(self.optimizer, self.learning_rate_factor(step))
        with phase("optimizer"):
            self.precision.step(self.optimizer, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None  # also of those that the optimizer does not hold: they would add up over steps
        self.buffers.share()
        self.progress.note_step(target_tokens)
        loss_sum = sum(losses[1:], losses[0])
        return StepResult(step + 1, loss_sum, grad_norm, learning_rate, target_tokens, self.progress.target_tokens)

    def _backpropagate(self, batch: Batch, weight: float, *, then: Phase) -> Tensor:
        """The sum of the batch's token losses; times `weight`, its gradients are added to those of the parameters."""
        with phase("forward"), self.precision.autocast():
            loss_sum = compute_loss(self.model, self.loss_function, batch)
        self._at(then)
        with phase("backward"):
            self.precision.backward(loss_sum, weight)
        return loss_sum.detach().float()

    def _fetch(self, batches: Iterator[Batch]) -> StepInput:
        """The next step's micro-batches, on their way to the device."""
        with self.throughput.waiting_for_data(), phase("data"):
            return fetch_step(batches, self.accumulation_steps, self.device_copy, lambda: self._at("reading data"))

    def _agree(self, upcoming: StepInput) -> int | None:
        """What all ranks must know before a step, in one small sum in host memory: its target tokens; None if there is none.

        Raises on all ranks what ends the run on any of them.
        """
        of_saves = self.checkpoints.has_given_up(), self.checkpoints.has_published()
        flags = bool(self.world.stop_request), bool(self._stop_reason), self.callbacks.error is not None, *of_saves
        sums = PendingSum([upcoming.target_tokens, *map(int, flags)], self.world).wait()
        target_tokens, asked_to_stop, stop_was_called, callback_failed, has_given_up, published = sums
        if callback_failed:
            self.callbacks.raise_error(self)
        if published:
            self._report_checkpoints()
        if self.progress.step >= self.max_steps:
            return None
        if has_given_up:
            stop_after_failed_saves(self.checkpoints, self.world, self.config.checkpoint)
        if stop_was_called and not asked_to_stop:
            self.last_step = self.progress.step  # so it is validated
            self._validate_if_due()
        return None if asked_to_stop or stop_was_called else target_tokens

    def _at(self, phase: Phase) -> None:
        self.world.heartbeat.mark(phase, step=self.progress.step)

    def stop(self, reason: str) -> None:
        """End after this step, on all ranks: validated, saved and finished, for `reason`. One rank may call it alone."""
        self._stop_reason = reason or "stopped by a callback"

    def log(self, line: dict[str, Any]) -> None:
        """Hand the tracker a line of the newest step, on rank 0: its `kind`, and numbers and texts by name."""
        self.tracker.log({"kind": line["kind"], "step": self.progress.step, **line, "time": time.time()})

    @contextmanager
    def between_steps(self) -> Generator[None]:
        """A context whose time does not count as that of steps. All steps so far are known to be finite, or it raises."""
        if self.throughput.is_paused:
            yield
            return
        with self.throughput.paused(), self.garbage.automatic():
            with self.throughput.waiting_for_steps():
                self.divergence.drain()
            self._at("in a callback")  # or what is marked within
            yield

    @contextmanager
    def evaluating(self) -> Generator[nn.Module]:
        """The model itself to evaluate between steps: with evaluation weights, in evaluation mode, without gradients."""
        model, buffers = unwrap(self.model), self.buffers.unchanged()
        with self.between_steps(), evaluation_weights(self.optimizer), evaluation_mode(model), buffers, torch.no_grad():
            yield model

    @property
    def has_finished(self) -> bool:
        """Whether nothing is left to do: no step, no last validation, no sample of text that a signal has interrupted."""
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
        self.state.restore(checkpoint, self.world)
        self.progress, self._resumed = progress, checkpoint
        self.checkpoints.set_best(progress.best)
        self.divergence.skipped_steps, self.divergence.skipped_in_a_row = progress.skipped_steps, progress.skipped_in_a_row

    def precompile(self) -> None:
        """Compile and allocate before the first step. For all ranks; raises StoppedError."""
        saves = broadcast_object(self.checkpoints.saves, self.world)
        self.first_step_check = FirstStepCheck(self.optimizer, unwrap(self.model), saves=saves, resumed=self._resumed)
        precompile(
            *(self.model, self.train_data, self.validation_data, self.world, self.precision, self.loss_function),
            self.step_context,
        )
        init_optimizer_state(self.optimizer)

    def _validate_and_save(self) -> None:
        step, every = self.progress.step, self.config.checkpoint.every_steps
        saves = every > 0 and step % every == 0
        if saves or self._validation_is_due():
            with self.between_steps():
                if (self._validate_if_due() and self.progress.is_best) or saves:
                    self._save()

    def _validate_if_due(self) -> bool:
        """Validate if this step asks for it and has not been validated yet; whether that was done, and not interrupted."""
        if not self._validation_is_due():
            return False
        assert self.validation_data is not None, "or none is due"
        with self.between_steps():
            with evaluation_weights(self.optimizer), phase("validation"):
                result = evaluate(
                    unwrap(self.model),
                    self.validation_data,
                    num_blocks=self.validation_data.sampler.num_blocks,  # type: ignore[attr-defined]
                    world=self.world,
                    precision=self.precision,
                    loss_function=self.loss_function,
                    token_bytes=self.token_bytes,
                    interrupted=self.world.stop_request.__bool__,
                )
            if result is None:
                return False
            self.progress.best = self._best_saved()  # a save may have failed meanwhile
            self.progress.note_validation(result.loss)
            self._is_saved = False
            self.callbacks.call("on_validation_end", self, result)
        return True

    def _validation_is_due(self) -> bool:
        step, is_done = self.progress.step, self.progress.validated_step == self.progress.step
        if self.validation_data is None or is_done:
            return False
        return validation_is_due(self.config.validation, step, max_steps=self.last_step, epoch_of=self.sampler.epoch_of)

    def _best_saved(self) -> Validated | None:
        """`progress.best`, unless its save has failed, which only rank 0 knows: then the best that is saved."""
        return broadcast_object(self.checkpoints.best(self.progress.best), self.world)

    def _report_checkpoints(self) -> None:
        for step, folder in broadcast_object(self.checkpoints.take_published(), self.world):
            self.callbacks.call("on_checkpoint", self, step, folder)

    def _save(self) -> None:
        with self.between_steps(), self.throughput.saving(), phase("checkpoint"):
            self._at("saving")
            progress, watch = self.progress, self.divergence
            progress.skipped_steps, progress.skipped_in_a_row = watch.skipped_steps, watch.skipped_in_a_row
            is_last = self._is_over or progress.step >= self.last_step
            take = partial(self.state.snapshot, progress, is_last=is_last)
            self.checkpoints.save(take, is_best=progress.is_best, before_publish=self.tracker.sync)
        self._is_saved = True
