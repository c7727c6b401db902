"""`Trainer`: the loop and the step. It receives finished objects and builds none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dist_trainer.checkpoint.folders import resume_point
from dist_trainer.checkpoint.host_copy import PinnedMemory
from dist_trainer.checkpoint.manager import Checkpoints, NoCheckpoints
from dist_trainer.checkpoint.optimizer_state import FirstStepCheck
from dist_trainer.checkpoint.state import Progress, Snapshot, restore, take_snapshot
from dist_trainer.config.rules import check_config
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.data.batch import Batch, DeviceCopy
from dist_trainer.data.sampler import GlobalOrderSampler, accumulation_steps
from dist_trainer.data.token_bytes import TokenBytes
from dist_trainer.distributed.beats import Phase
from dist_trainer.distributed.collectives import PendingSum, broadcast_object, run_and_share_errors, run_on_rank0
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, StoppedError, TrainingDivergedError
from dist_trainer.generation.samples import Sample, log_sample, sample_is_due
from dist_trainer.models.loss import model_loss
from dist_trainer.optim.evaluation_weights import evaluation_weights, training_weights
from dist_trainer.optim.registry import init_optimizer_state
from dist_trainer.optim.schedules import build_schedule, set_learning_rates, total_steps
from dist_trainer.parallel.buffers import Buffers
from dist_trainer.parallel.registry import compute_loss, gradient_sync, unwrap
from dist_trainer.tracking.throughput import Throughput
from dist_trainer.tracking.tracker import NullTracker, Tracker
from dist_trainer.training.garbage_collection import AgreedCollections
from dist_trainer.training.last_save import finalize_checkpoint, stop_after_failed_saves
from dist_trainer.training.nonfinite import DivergenceWatch
from dist_trainer.training.precision import Precision
from dist_trainer.training.precompile import warm_up
from dist_trainer.training.result import TrainingResult, result_when_stopped
from dist_trainer.training.step import StepInput, StepResult, seed_dropout
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
        tracker: Tracker | None = None,
        sample: Sample | None = None,
        token_bytes: TokenBytes | None = None,
        flops_per_token: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """`model` is on world.device, wrapped by `parallelize`; `optimizer` is over its parameters.

        `loss_function(model, batch)` gives the sum of the batch's token losses. `step_context` makes a context for each
        forward and backward pass. `flops_per_token` is for MFU, `token_bytes` for
        bits per byte; `facts` are remembered in every checkpoint. `checkpoints` and `tracker` are used on rank 0 alone.
        """
        check_config(config)
        self.config, self.world = config, world
        self.model, self.optimizer, self.step_context = model, optimizer, step_context
        self.train_data, self.validation_data = train_data, validation_data
        self.precision, self.loss_function = precision or Precision("fp32", world.device), loss_function
        self.checkpoints = checkpoints if checkpoints is not None and world.is_main else NoCheckpoints()
        self.tracker = tracker if tracker is not None and world.is_main else NullTracker()
        self.sample, self.token_bytes, self.metadata = sample, token_bytes, metadata or {}
        self.progress = Progress()

        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers, self.garbage = Buffers(unwrap(model), world), AgreedCollections()
        self.accumulation_steps = accumulation_steps(config.batch, world.world_size)
        if not isinstance(train_data.sampler, GlobalOrderSampler):
            raise ConfigError("train_data: only loaders that create_dataloaders made; it takes a data set of your own")
        self.sampler = train_data.sampler
        self.device_copy, self.pinned = DeviceCopy(world.device), PinnedMemory()
        self.max_steps = total_steps(config.train, self.sampler.steps_per_epoch)
        self.learning_rate_factor = build_schedule(config.schedule, self.max_steps)
        skipping = "skip" if self.precision.name == "fp16" else config.train.on_non_finite
        self.divergence = DivergenceWatch(skipping, max_skipped_steps=config.train.max_skipped_steps, device=world.device)
        self.throughput = Throughput(world, dtype=self.precision.name, flops_per_token=flops_per_token)
        self.note_step: Callable[[int], None] = lambda step: None
        self._saved_step, self._logged_step, self._stopped = 0, 0, False
        self._resumed: Path | None = None

    # ------------------------------------------------------------------------------------------------ the loop

    def fit(self) -> TrainingResult:
        """Train to `max_steps`, or until a signal on any rank asks to stop; both end in a checkpoint.

        Raises TrainingDivergedError, SavingFailedError, and LauncherLostError after saving: on all ranks at the same step.
        Nothing is being written any more when it returns or raises.
        """
        try:
            with training_weights(self.optimizer):
                return self._fit()
        finally:
            self.checkpoints.wait()

    def _fit(self) -> TrainingResult:
        self._saved_step = self.progress.step
        with self.world.stop_request.listen(), self.garbage:
            try:
                self._at("warming up")
                self.warm_up()
            except StoppedError as stopped:
                return TrainingResult("preempted", self.progress, stopped.signal_number)
            self._run_pending_validation()
            # After the warm-up, which reads too: loaders with lasting workers have but one iterator.
            self.sampler.seek(self.progress.step)
            batches = iter(self.train_data)
            self.throughput.start(step=self.progress.step, tokens=self.progress.target_tokens)
            upcoming = self._fetch(batches)
            while self.progress.step < self.max_steps and not self._stopped:
                target_tokens, asked_to_stop, saving_failed = upcoming.metadata.wait()
                if saving_failed:
                    stop_after_failed_saves(self.checkpoints, self.world, self.config.checkpoint)
                if asked_to_stop:
                    self._stopped = True
                    break
                self._at("training")
                self.device_copy.wait(upcoming.micro_batches)
                result = self.train_step(upcoming.micro_batches, target_tokens)
                self.first_step_check.after_step()
                self._watch(result)
                self.note_step(result.step)
                self._at("reading data")
                upcoming = self._fetch(batches)
                self._after_step(result)
            upcoming.metadata.wait()
        self._watch(None)
        if self._saved_step != self.progress.step:
            self._save()
        self._at("saving")
        finalize_checkpoint(self.checkpoints, self.world, save_again=self._save)
        # Only rank 0 knows whether a save has failed meanwhile.
        self.progress.best = broadcast_object(self.checkpoints.best(self.progress.best), self.world)
        if self._stopped:
            return result_when_stopped(self.progress, self.world)
        return TrainingResult("finished", self.progress)

    def resume(self, checkpoints: Path) -> bool:
        """Go on from the newest intact checkpoint in the folder `checkpoints`; whether there is one. For all ranks.

        Raises CheckpointError where none is intact, or where it holds another model's state.
        """
        found = run_on_rank0(self.world, lambda: resume_point(checkpoints, keep_last=self.config.checkpoint.keep_last))
        if found is not None:
            self.restore(*found)
        return found is not None

    def restore(self, checkpoint: Path, progress: Progress) -> None:
        """Stand where `checkpoint` was taken, after `progress`. For all ranks; raises CheckpointError on all of them."""
        verifies = self.world.local_rank == 0
        run_and_share_errors(
            self.world, lambda: restore(checkpoint, unwrap(self.model), self.optimizer, self.precision, verifies=verifies)
        )
        self.progress, self._resumed = progress, checkpoint
        self.checkpoints.begin_with(progress.best)
        self.divergence.skipped_steps, self.divergence.skipped_in_a_row = progress.skipped_steps, progress.skipped_in_a_row

    @property
    def has_finished(self) -> bool:
        """Whether nothing is left to do: neither a step nor the last validation, nor a sample that was broken off."""
        validated = self.validation_data is None or self.progress.validated_step == self.progress.step
        return self.progress.step >= self.max_steps and validated and not self.progress.owes_sample

    def train_step(self, micro_batches: list[Batch], target_tokens: int) -> StepResult:
        """One update on loss = (sum of token losses) / target_tokens, over all ranks and micro-batches."""
        step = self.progress.step
        losses: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            seed_dropout(self.config.seed, step, block=index * self.world.world_size + self.world.rank)
            with self.step_context(), gradient_sync(self.model, enabled=index == len(micro_batches) - 1):
                with self.precision.autocast():
                    micro_loss_sum = compute_loss(self.model, self.loss_function, batch)
                self._at("backward" if index == len(micro_batches) - 1 else "training")
                # Ranks average their gradients; times their number, the average is the sum again.
                self.precision.backward(micro_loss_sum, self.world.world_size / max(1, target_tokens))
            losses.append(micro_loss_sum.detach().float())
            del micro_loss_sum  # a graph that is still held would survive the collection, with its activations
            self.garbage.collect()

        self._at("updating")
        self.precision.unscale(self.optimizer)
        grad_norm = self._clip_gradients()
        learning_rate = set_learning_rates(self.optimizer, self.learning_rate_factor(step))
        self.precision.step(self.optimizer, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters:
            parameter.grad = None  # also of those that the optimizer does not hold: they would add up over steps
        self.buffers.share()
        self.progress.note_step(target_tokens)
        loss_sum = sum(losses[1:], losses[0])
        return StepResult(step + 1, loss_sum, grad_norm, learning_rate, target_tokens, self.progress.target_tokens)

    def _clip_gradients(self) -> Tensor:
        """Scale gradients down to `optim.max_grad_norm`; their norm before, over all parameters: a float32 scalar."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        grad_norm = get_total_norm(gradients)
        if self.config.optim.max_grad_norm > 0:
            clip_grads_with_norm_(self.parameters, self.config.optim.max_grad_norm, grad_norm)
        return grad_norm.float()

    def _fetch(self, batches: Iterator[Batch]) -> StepInput:
        """The next step's micro-batches, on their way to the device, and the facts on theirs to all ranks."""
        with self.throughput.waiting_for_data():
            fetched = []
            while len(fetched) < self.accumulation_steps:
                self._at("reading data")
                fetched.append(next(batches))
            target_tokens = sum(batch.num_targets() for batch in fetched)
            on_device = self.device_copy.start(fetched)
        metadata = [target_tokens, int(bool(self.world.stop_request)), int(self.checkpoints.has_given_up())]
        return StepInput(on_device, PendingSum(metadata, self.world))

    # --------------------------------------------------------------------------------------- between the steps

    def warm_up(self) -> None:
        """Compile, and whatever else must not happen in the first step. For all ranks; raises StoppedError."""
        saves = broadcast_object(not isinstance(self.checkpoints, NoCheckpoints), self.world)
        self.first_step_check = FirstStepCheck(self.optimizer, unwrap(self.model), saves=saves, resumed=self._resumed)
        warm_up(
            *(self.model, self.train_data, self.validation_data, self.world, self.precision, self.loss_function),
            self.step_context,
        )
        init_optimizer_state(self.optimizer)

    def _at(self, phase: Phase) -> None:
        self.world.heartbeat.mark(phase, step=self.progress.step)

    def _after_step(self, result: StepResult) -> None:
        step = result.step
        if step % self.config.tracking.log_every_steps == 0 or step in (1, self.max_steps):
            self._log_step(result)
        with self.throughput.paused(), self.garbage.automatic():
            improved = self._validate_if_due()
            self._sample_if_due(validated=self.progress.validated_step == step)
            every = self.config.checkpoint.every_steps
            if improved or (every and step % every == 0):
                self._save()

    def _watch(self, result: StepResult | None) -> None:
        """Hand `result` to the divergence watch (None: all steps are to be done); the step it ends the run for is logged."""
        try:
            if result is None:
                with self.throughput.waiting_for_steps():
                    self.divergence.drain()
            else:
                self.divergence.observe(result)
        except TrainingDivergedError:
            assert self.divergence.judged is not None, "it has just been judged"
            if self.divergence.judged.step > self._logged_step:
                self._log_step(self.divergence.judged)
            raise

    def _log_step(self, result: StepResult) -> None:
        """The only place where the device is awaited."""
        self._at("logging")
        self._logged_step = result.step
        self.tracker.log(
            {
                "kind": "train",
                **result.metadata(self.world),
                "skipped_steps": self.divergence.skipped_steps,
                "epoch": self.sampler.epoch_of(result.step),
                **self.throughput.measure(step=result.step, tokens=result.target_tokens_so_far),
                "time": time.time(),
            }
        )

    def _validate_if_due(self) -> bool:
        """Validate where this step asks for it and has not been yet; whether the loss is the best so far."""
        step = self.progress.step
        if self.validation_data is None or self.progress.validated_step == step:
            return False
        if not validation_is_due(self.config.validation, step, max_steps=self.max_steps, epoch_of=self.sampler.epoch_of):
            return False
        self._watch(None)
        with evaluation_weights(self.optimizer):
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
            self._stopped = True
            return False
        # Only rank 0 knows whether a save has failed meanwhile.
        self.progress.best = broadcast_object(self.checkpoints.best(self.progress.best), self.world)
        is_best = self.progress.note_validation(result.loss)
        metadata = {**result.metadata(), "best": is_best, "seconds": result.seconds, "time": time.time()}
        self.tracker.log({"kind": "validation", "step": step, **metadata})
        return is_best

    def _sample_if_due(self, *, validated: bool) -> None:
        """A sample of text where one is due; what a signal broke off, or kept from beginning, is owed to the next start."""
        progress, is_last = self.progress, self.progress.step >= self.max_steps
        if progress.owes_sample or sample_is_due(self.config.tracking, progress.step, validated=validated, is_last=is_last):
            self._watch(None)
            model, log_line = unwrap(self.model), self.tracker.log
            with evaluation_weights(self.optimizer):
                done = not self._stopped and log_sample(self.sample, model, self.world, log_line, step=progress.step)
            self._stopped = not done
            progress.owed_sample_step = 0 if done else progress.step

    def _run_pending_validation(self) -> None:
        """A run that was stopped while it validated, or sampled, still owes that."""
        before, owes_sample = self.progress.validated_step, self.progress.owes_sample
        self._validate_if_due()
        if (validated := self.progress.validated_step != before) or owes_sample:
            self._sample_if_due(validated=validated)
            self._save()

    def _save(self) -> None:
        self._watch(None)
        self._at("saving")
        with self.throughput.saving():
            self.progress.skipped_steps = self.divergence.skipped_steps
            self.progress.skipped_in_a_row = self.divergence.skipped_in_a_row
            is_best = self.progress.best_step == self.progress.step
            self.checkpoints.save(self._take_snapshot, is_best=is_best, after=self.tracker.sync)
        self._saved_step = self.progress.step

    def _take_snapshot(self) -> Snapshot:
        goes_on = not self._stopped and self.progress.step < self.max_steps
        parts = {"scaler": self.precision.state_dict(), "progress": self.progress, "metadata": self.metadata}
        return take_snapshot(unwrap(self.model), self.optimizer, **parts, training_goes_on=goes_on, pinned=self.pinned)
