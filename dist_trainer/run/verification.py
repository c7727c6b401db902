"""`verify`: replays steps of a run, or the first steps of a config, and compares bits: with what the run recorded and saved,
and between numbers of ranks. The run's folder is only read, except for the certificate and the report.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from dist_trainer.checkpoint.folders import find_checkpoint, step_folders, step_of
from dist_trainer.checkpoint.state import read_training_state
from dist_trainer.config.keys import flatten
from dist_trainer.config.paths import CHECKPOINTS, RUN_CONFIG, user_path
from dist_trainer.config.schema import DistributedConfig, TrainingConfig
from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.data.sampler import sequences_per_validation_block
from dist_trainer.distributed.collectives import broadcast_object, run_and_share_errors, run_on_rank0
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.distributed.launch_env import rank_info
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import EXIT_DIFFERS, EXIT_FINISHED, CheckpointError, ConfigError, counted
from dist_trainer.run.certificate import Verdict, write_certificate
from dist_trainer.run.comparison import compare, first_tensor, in_words
from dist_trainer.run.configure import load_config
from dist_trainer.run.lifecycle import on_all_ranks
from dist_trainer.run.replay import WEIGHTS_FILE, Line, Plan, first_difference, replay, without_traces
from dist_trainer.run.replay_ranks import start_ranks, threads_for
from dist_trainer.tracking.run_log import configure_logging
from dist_trainer.tracking.run_reader import METRICS_FILE, complete_lines, last_logged_step, parse_line, read_run

log = logging.getLogger(__name__)

STEPS_OF_A_CONFIG = (1, 20)
OWN_STRATEGIES = ("auto", "single", "ddp")

Start = Callable[[Plan, int], list[Line]]
"""Replays a plan on a number of ranks."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    run: Path | None
    """A run's folder; None: only the config is given."""
    config: TrainingConfig | None = None
    """None: the run's."""
    steps: tuple[int, int] | None = None
    """First and last; None: from the newest checkpoint but one to the newest, or a config's first 20."""
    ranks: tuple[int, ...] = ()
    """Numbers of ranks to start; none: on the ranks that this process is one of."""
    output: Path | None = None
    """The certificate; None: in the run's folder, or for a config in the current one."""


@dataclass(frozen=True)
class Subject:
    """What is verified."""

    plan: Plan
    lines: tuple[Line, ...] = ()
    """What the run recorded at these steps."""
    run_ranks: int | None = None
    """Ranks that the run had; None: there is no run."""
    inexact: str | None = None
    """Why the sums depend on the number of ranks; None: they do not."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        batch = self.plan.config.batch
        return batch.global_batch_size // batch.sequences_per_micro_batch(self.run_ranks or 1)


def verify(request: Request, *, stop_request: StopRequest | None = None, start: Start | None = None) -> int:
    """Print and certify what was found; EXIT_FINISHED if all is equal, else EXIT_DIFFERS. Raises DistTrainerError.

    `start` (None: as processes) starts the ranks of `request.ranks`.
    """
    if not request.ranks:
        return _on_own_ranks(request, stop_request)
    configure_logging(None, rank=0)
    stop_request = StopRequest() if stop_request is None else stop_request  # one without a signal is false
    start = start or partial(start_ranks, threads=threads_for(max(request.ranks)), stop_request=stop_request)
    with _scratch() as scratch:
        subject = find_subject(request, request.ranks, scratch)
        check_ranks(subject, request.ranks, option="--ranks")
        found: dict[int, list[Line]] = {}
        for ranks in request.ranks:
            folder = scratch / f"ranks-{ranks}"
            folder.mkdir()
            log.info("replaying steps %d-%d on %s", subject.plan.first, subject.plan.last, counted(ranks, "rank"))
            found[ranks] = start(replace(subject.plan, scratch=folder), ranks)
        return _conclude(request, subject, judge(subject, found, start=start), found)


def _on_own_ranks(request: Request, stop_request: StopRequest | None) -> int:
    def attempt(world: DistributedContext) -> int:
        with _scratch() as scratch:
            subject = run_on_rank0(world, lambda: find_subject(request, (world.world_size,), scratch))
            check_ranks(subject, (world.world_size,), option="ranks")
            found = {world.world_size: replay(replace(subject.plan, scratch=scratch), world)}

            def conclude() -> int:
                return _conclude(request, subject, judge(subject, found), found)

            return broadcast_object(run_and_share_errors(world, conclude, acts=world.is_main), world) or EXIT_FINISHED

    with _scratch() as scratch:
        config = _config_of(_raw_config(_run_of(request)), scratch)
        return on_all_ranks(attempt, _shareable(without_traces(config, scratch)), stop_request=stop_request)


def _conclude(request: Request, subject: Subject, verdict: Verdict, found: Mapping[int, list[Line]]) -> int:
    folder = Path() if request.run is None else request.run
    file = write_certificate(verdict, subject.plan, found, folder=folder, output=request.output, run_ranks=subject.run_ranks)
    print("\n".join([*verdict.lines, f"certificate: {file}", "equal" if verdict.is_equal else "differs"]), flush=True)
    return EXIT_FINISHED if verdict.is_equal else EXIT_DIFFERS


# ------------------------------------------------------------------------------------------------ what to replay


def find_subject(request: Request, ranks: tuple[int, ...], scratch: Path) -> Subject:
    """Steps, checkpoint and config for these numbers of ranks; what the run recorded. Raises ConfigError, CheckpointError."""
    if request.run is None:
        assert request.config is not None, "the command gives one of them"
        return _subject_of_config(request.config, request.steps or STEPS_OF_A_CONFIG, ranks, scratch)
    return _subject_of_run(request.run, request.steps, ranks, scratch)


def _subject_of_config(config: TrainingConfig, steps: tuple[int, int], ranks: tuple[int, ...], scratch: Path) -> Subject:
    first, last = steps
    if first != 1:
        raise ConfigError(f"--steps: {first}-{last}, but a config without a run has no checkpoint; give 1-{last}")
    config = _with_micro_batch(config, config.batch.sequences_per_micro_batch(1), ranks)
    return Subject(Plan(config, first, last, scratch), inexact=_why_inexact(config.distributed))


def _subject_of_run(run: Path, steps: tuple[int, int] | None, ranks: tuple[int, ...], scratch: Path) -> Subject:
    kept = step_folders(run / CHECKPOINTS)[::-1]
    done = max([last_logged_step(run), *map(step_of, kept)])
    if not done:
        raise ConfigError(f"{run} has no finished step yet; verify it when it has")
    last = steps[1] if steps else step_of(kept[-1]) if kept else done
    if last > done:
        raise ConfigError(f"--steps: up to {last}, but {run} has finished {counted(done, 'step')}")
    raw = _raw_config(run)
    # A checkpoint has the config of the steps before it; the run may have continued with another one.
    state = next((read_training_state(folder) for folder in kept if step_of(folder) >= last), {})
    of_run = _config_of(state.get("config") or raw, scratch)
    begin = steps[0] - 1 if steps else step_of(kept[-2]) if len(kept) > 1 else None
    checkpoint = _checkpoint_before(run, kept, begin, flatten(raw).get("checkpoint.resume", "auto"))
    first = steps[0] if steps else (1 if checkpoint is None else read_training_state(checkpoint)["progress"].step + 1)
    run_ranks = _count_of(state.get("world_size")) or _count_of(read_run(run).environment.get("world_size")) or 1
    size = _count_of(state.get("micro_batch_size")) or of_run.batch.sequences_per_micro_batch(run_ranks)
    config = _with_micro_batch(of_run, size, ranks)
    found = (parse_line(text) for text, _ in complete_lines(run / METRICS_FILE))
    lines = [line for line in found if line is not None and first <= line["step"] <= last]
    if sequences_per_validation_block(config.batch) != sequences_per_validation_block(of_run.batch):
        lines = [line for line in lines if line["kind"] != "validation"]  # sums of other blocks
    if all(line["kind"] != "validation" for line in lines):  # none to compare, but one is due after the last step
        config = replace(config, validation=replace(config.validation, max_global_batches=1))
    saved = tuple(folder for folder in kept if first <= step_of(folder) <= last)
    plan = Plan(config, first, last, scratch, checkpoint, saved)
    if "reduction" not in (state or flatten(raw.get("distributed", {}))):
        raise ConfigError(
            f"{run} was trained before sums had a fixed order (distributed.reduction): a replay may differ in the last bits"
        )
    return Subject(plan, tuple(lines), run_ranks, _why_inexact(config.distributed))


def _count_of(value: Any) -> int | None:
    """`value` if it is a positive whole number."""
    return value if type(value) is int and value > 0 else None


def _checkpoint_before(run: Path, kept: Sequence[Path], begin: int | None, origin: str) -> Path | None:
    """The newest that holds at most `begin` steps (None: the run's beginning); None: step 0. `origin`: checkpoint.resume."""
    if begin is not None and (before := [folder for folder in kept if step_of(folder) <= begin]):
        return find_checkpoint(before[-1].absolute())
    if origin in ("auto", "never"):
        if not begin:
            return None
        known = f"the first one is of step {step_of(kept[0])}" if kept else "there is none"
        hint = f"--steps {step_of(kept[0]) + 1}-..., or " if kept else ""
        raise ConfigError(f"--steps: {run} has no checkpoint before step {begin + 1} ({known}); give {hint}--steps 1-...")
    checkpoint = find_checkpoint(user_path(origin))
    start = read_training_state(checkpoint)["progress"].step
    if begin is not None and begin < start:
        raise ConfigError(f"--steps: {run} began at step {start + 1}, from {checkpoint}; give later steps")
    return checkpoint


def check_ranks(subject: Subject, ranks: Sequence[int], *, option: str) -> None:
    """Raises ConfigError for numbers of ranks that cannot share the micro-batches, or whose sums may differ."""
    shares = [n for n in range(1, subject.micro_batches + 1) if subject.micro_batches % n == 0]
    for number in ranks:
        if number not in shares:
            raise ConfigError(
                f"{option}: {counted(number, 'rank')} cannot share the {counted(subject.micro_batches, 'micro-batch', 'es')} "
                f"of a step evenly; choose from {', '.join(map(str, shares))}"
            )
    numbers = sorted({*ranks, *([subject.run_ranks] if subject.run_ranks else [])})
    if subject.inexact is not None and len(numbers) > 1:
        named = " and ".join([*map(str, numbers[:-1]), counted(numbers[-1], "rank")])
        raise ConfigError(
            f"{subject.inexact}: sums on {named} may differ in their last bits; only exact "
            "sums can be verified on another number of ranks"
        )
    if subject.run_ranks is not None and len(ranks) == 1 and not (subject.lines or subject.plan.saved):
        raise ConfigError(f"--steps: the run has no line and no checkpoint at {_steps(subject.plan)}; give a longer range")


def _why_inexact(config: DistributedConfig) -> str | None:
    if config.reduction != "exact":
        return f"distributed.reduction is {config.reduction}"
    if config.strategy not in OWN_STRATEGIES:
        return f"distributed.strategy is {config.strategy}, which adds gradients itself"
    return None


def _run_of(request: Request) -> Path:
    assert request.run is not None, "the command gives one of them"
    return request.run


def _raw_config(run: Path) -> Mapping[str, Any]:
    file = run / RUN_CONFIG
    try:
        raw = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); give a run's folder, such as runs/default") from error
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{file} is not a run's config")
    return raw


def _config_of(raw: Mapping[str, Any], scratch: Path) -> TrainingConfig:
    file = scratch / RUN_CONFIG
    file.write_text(yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True), encoding="utf-8")
    # The model that the run started from may be gone.
    return load_config(["--config", str(file), "--checkpoint.resume", "auto"], trains=False)


def _with_micro_batch(config: TrainingConfig, size: int, ranks: tuple[int, ...]) -> TrainingConfig:
    """`config`, changed so that all these numbers of ranks have micro-batches of `size` sequences."""
    if all(config.batch.sequences_per_micro_batch(each) == size for each in ranks):
        return config
    return replace(config, batch=replace(config.batch, micro_batch_size=size))


def _shareable(config: TrainingConfig) -> TrainingConfig:
    """`config`, valid for any number of ranks: whether they can share its micro-batches is checked later, with the plan."""
    return replace(config, batch=replace(config.batch, global_batch_size=rank_info().world_size, micro_batch_size=1))


@contextmanager
def _scratch() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="dist_trainer-verify-") as folder:
        yield Path(folder)


# ------------------------------------------------------------------------------------------------ what differs


def judge(subject: Subject, found: Mapping[int, list[Line]], *, start: Start | None = None) -> Verdict:
    """Compare what was found with the run, and between numbers of ranks: `start` replays once more to measure a difference."""
    lines, differences = [f"{_steps(subject.plan)}, {_origin(subject.plan)}"], []
    run = None if subject.run_ranks is None else counted(subject.run_ranks, "rank")
    for ranks, of_ranks in found.items() if run is not None else ():
        compared, difference = compare(subject.lines, of_ranks)
        checkpoints = [line for line in of_ranks if line["kind"] == "checkpoint"]
        tensors = [(line["step"], line["tensor"], line["difference"]) for line in checkpoints if line["tensor"] is not None]
        text = in_words(difference, tensors[0] if tensors else None, of="the run and the replay")
        equal = f"equal: {counted(compared, 'number')} and {counted(len(checkpoints), 'checkpoint')}"
        lines.append(f"{counted(ranks, 'rank')}, compared with the run on {run}: {text or equal}")
        differences += lines[-1:] if text else []
    first, *others = found
    for ranks in others:
        _, difference = compare(found[first], found[ranks])
        tensor = first_tensor(found[first], found[ranks])
        measured = tensor and (*tensor, _largest(subject.plan, *tensor, (first, ranks), start))
        text = in_words(difference, measured, of=f"{first} and {counted(ranks, 'rank')}")
        count = counted(subject.plan.last - subject.plan.first + 1, "step")
        lines.append(f"{first} and {counted(ranks, 'rank')}, {count}: {text or 'equal'}")
        differences += lines[-1:] if text else []
    return Verdict(not differences, tuple(lines), tuple(differences))


def _largest(plan: Plan, step: int, name: str, ranks: tuple[int, int], start: Start | None) -> float | None:
    """The largest difference between the elements of the tensor after that step, replayed again; None if it is equal now."""
    assert start is not None, "several numbers of ranks were started"
    weights = []
    for number in ranks:
        folder = plan.scratch / f"weights-{ranks[0]}-{ranks[1]}-of-{number}"
        folder.mkdir()
        start(replace(plan, scratch=folder, first=step, last=step, saved=(), weights_of=step), number)
        weights.append(load_file(folder / WEIGHTS_FILE))
    found, difference = first_difference({name: weights[0][name]}, {name: weights[1][name]})
    return None if found is None else difference


def _steps(plan: Plan) -> str:
    return f"step {plan.first}" if plan.first == plan.last else f"steps {plan.first}-{plan.last}"


def _origin(plan: Plan) -> str:
    return "replayed from the beginning" if plan.checkpoint is None else f"replayed from {plan.checkpoint.name}"
