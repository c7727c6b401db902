"""Callbacks: in which order they are called, that a run ends by them on all ranks alike, and what it says of them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from dist_trainer.checkpoint.state import Progress
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import CallbackError, ConfigError, TrainingDivergedError
from dist_trainer.training.callbacks import CallbackList, MetricsLogger
from tests.distributed.small_runs import changed, command, folder, losses, metrics, run, same_weights, small_config, status

HOOKS = ("on_fit_start", "on_step_end", "on_validation_end", "on_checkpoint", "on_error", "close")


class Notes:
    """Notes each call of each rank in the output folder."""

    def __init__(self, config: TrainingConfig) -> None:
        self.folder = Path(config.output_dir)

    def _note(self, trainer: Any, text: str) -> None:
        with (self.folder / f"calls-{trainer.world.rank}.txt").open("a") as file:
            file.write(f"{text}\n")

    def on_fit_start(self, trainer: Any) -> None:
        self._note(trainer, f"start {trainer.progress.step}")

    def on_step_end(self, trainer: Any, result: Any) -> None:
        self._note(trainer, f"step {result.step}")

    def on_validation_end(self, trainer: Any, result: Any) -> None:
        self._note(trainer, f"validation {trainer.progress.step} {result.loss}")

    def on_checkpoint(self, trainer: Any, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self._note(trainer, f"checkpoint {step} {folder.name}")

    def on_error(self, trainer: Any, error: BaseException) -> None:
        self._note(trainer, f"error {error}")

    def close(self, trainer: Any, result: Any) -> None:
        self._note(trainer, f"close {result and result.state}")


class Failing:
    """Raises in one hook on one rank at one step."""

    def __init__(self, hook: str, rank: int, error: Exception) -> None:
        def act(trainer: Any, *_: Any) -> None:
            if trainer.world.rank == rank and (trainer.progress.step >= 3 or hook == "on_fit_start"):
                raise error

        setattr(self, hook, act)


class Stopping:
    """Stops the run after step 3, on one rank alone."""

    def __init__(self, rank: int, hook: str = "on_step_end") -> None:
        def act(trainer: Any, *_: Any) -> None:
            if trainer.world.rank == rank and trainer.progress.step == 3:
                trainer.stop(f"rank {rank} has seen enough")

        setattr(self, hook, act)


def calls(config: TrainingConfig, rank: int = 0) -> list[str]:
    return (Path(config.output_dir) / f"calls-{rank}.txt").read_text().splitlines()


def with_callbacks(config: TrainingConfig, *makers: Any, monkeypatch: pytest.MonkeyPatch) -> TrainingConfig:
    """`config` with functions that are found in this module by name, as users' are."""
    for number, make in enumerate(makers):
        monkeypatch.setitem(globals(), f"make_{number}", make)
    return changed(config, train__callbacks=tuple(f"{__name__}:make_{number}" for number in range(len(makers))))


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_call_all_hooks_in_order_and_the_numbers_are_those_of_a_run_without(stories, tmp_path, monkeypatch, ranks):
    plain = small_config(stories, tmp_path / "plain", train__max_steps=6)
    config = with_callbacks(small_config(stories, tmp_path / "run", train__max_steps=6), Notes, monkeypatch=monkeypatch)
    assert run(plain, ranks) == run(config, ranks) == [0] * ranks
    assert losses(config) == losses(plain)
    assert same_weights(config, plain)
    for rank in range(ranks):
        noted = calls(config, rank)
        saved = [line for line in noted if line.startswith("checkpoint")]
        validated = [float(line.split()[2]) for line in noted if line.startswith("validation")]
        assert validated == losses(config, "validation")
        assert saved[0] == "checkpoint 4 step-00000004"
        assert saved[-1] == "checkpoint 6 step-00000006"
        others = [line.split()[0] + " " + line.split()[1] for line in noted if not line.startswith("checkpoint")]
        steps = [f"step {step}" for step in range(1, 7)]
        assert others == ["start 0", *steps[:5], "validation 5", "step 6", "validation 6", "close finished"]
        assert noted.index("step 4") < noted.index(saved[0])
        assert noted[-1] == "close finished"


@pytest.mark.parametrize("hook", [*HOOKS[:4], "close"])
def test_a_callback_that_fails_on_one_rank_is_named_and_ends_the_run_on_all(stories, tmp_path, monkeypatch, hook):
    config = with_callbacks(
        small_config(stories, tmp_path, validation__every_steps=3, checkpoint__every_steps=3),
        lambda _: Failing(hook, 1, ValueError("no such file")),
        Notes,
        monkeypatch=monkeypatch,
    )
    assert command(config, 2) == [1, 1]
    reason = f"rank 1: {__name__}.Failing.{hook} failed: ValueError: no such file"
    ended = status(config)
    assert (ended["state"], ended["exit_code"], ended["reason"]) == ("failed", 1, reason)
    if hook != "on_checkpoint":
        assert ended["step"] == {"on_fit_start": 0, "close": 12}.get(hook, 3)
    assert f"{reason}\nTraceback" in (folder(config) / "logs" / "rank-1.log").read_text()
    if hook != "close":
        assert calls(config)[-2:] == calls(config, 1)[-2:] == [f"error {reason}", "close None"]


def test_when_an_error_is_told_no_checkpoint_is_being_written(stories, tmp_path, monkeypatch):
    """A callback may copy or upload what is saved. The write of step 4 ends only after someone waits for it."""
    is_awaited = threading.Event()

    def write_when_awaited(trainer):
        checkpoints, wait, publish = trainer.checkpoints, trainer.checkpoints.wait, trainer.checkpoints._publish
        checkpoints.wait = lambda: (is_awaited.set(), wait())
        checkpoints._publish = lambda snapshot: (is_awaited.wait(60), publish(snapshot))[1]

    class Looking:
        def on_step_end(self, trainer, result):
            if result.step == 5:
                raise ValueError

        def on_error(self, trainer, error):
            found = (folder(config) / "checkpoints").glob("step-*")
            (tmp_path / "found").write_text(" ".join(path.name for path in found))

    plain = small_config(stories, tmp_path, validation__every_steps=0)
    config = with_callbacks(plain, lambda _: Looking(), monkeypatch=monkeypatch)
    assert command(config, 1, before=write_when_awaited) == [1]
    assert (tmp_path / "found").read_text() == "step-00000004"


def test_the_exit_code_is_that_of_an_error_of_ours(stories, tmp_path, monkeypatch):
    diverged = TrainingDivergedError("as we see it")
    config = with_callbacks(
        small_config(stories, tmp_path), lambda _: Failing("on_step_end", 0, diverged), monkeypatch=monkeypatch
    )
    assert command(config, 1) == [TrainingDivergedError.exit_code]
    assert status(config)["reason"] == f"{__name__}.Failing.on_step_end failed: TrainingDivergedError: as we see it"


@pytest.mark.parametrize("hook", ["on_step_end", "on_validation_end"])
def test_one_rank_alone_may_end_the_run_after_a_step_and_all_is_validated_and_saved(
    stories, tmp_path, undisturbed, monkeypatch, hook
):
    every = 3 if hook == "on_validation_end" else 0
    config = with_callbacks(
        small_config(stories, tmp_path / "run", validation__every_steps=every),
        lambda _: Stopping(1, hook),
        monkeypatch=monkeypatch,
    )
    assert run(config, 2) == [0, 0]
    ended = status(config)
    assert (ended["state"], ended["step"], ended["exit_code"]) == ("finished", 3, 0)
    assert (ended["reason"], ended["max_steps"]) == ("rank 1 has seen enough", 12)
    assert losses(config) == losses(undisturbed(2, {}))[:3]
    assert [line["step"] for line in metrics(config, "validation")] == [3]
    assert (folder(config) / "checkpoints" / "latest").resolve().name == "step-00000003"
    assert (folder(config) / "checkpoints" / "best").resolve().name == "step-00000003"


def test_what_has_no_hook_is_rejected_before_the_first_step(stories, tmp_path, monkeypatch):
    config = with_callbacks(small_config(stories, tmp_path), lambda _: object(), monkeypatch=monkeypatch)
    with pytest.raises(AssertionError, match=r"ConfigError: callbacks: builtins\.object has none of the methods on_fit_start"):
        run(config, 1)
    nowhere = changed(config, train__callbacks=("no_such_module:f",))
    with pytest.raises(AssertionError, match=r"ConfigError: train\.callbacks: 'no_such_module:f' cannot be imported"):
        run(nowhere, 1)
    with pytest.raises(ConfigError, match="none of the methods"):
        CallbackList([logging])


def test_callbacks_are_called_in_the_order_of_the_list() -> None:
    calls: list[int] = []

    class Numbered:
        def __init__(self, number: int) -> None:
            self.number = number

        def on_step_end(self, trainer: Any, result: Any) -> None:
            calls.append(self.number)

    CallbackList([Numbered(1), Numbered(2), Numbered(3)]).call("on_step_end", None, None)  # type: ignore[arg-type]
    assert calls == [1, 2, 3]


def test_an_error_in_a_callback_of_the_trainer_is_not_reported_as_the_user_s():
    callbacks, trainer = CallbackList([MetricsLogger(1)]), Mock(divergence=None)
    trainer.world.world_size = 1
    callbacks.call("on_error", trainer, ValueError())
    assert str(callbacks.error).startswith("dist_trainer's own MetricsLogger (on_error) failed: AttributeError: ")


def test_the_first_of_several_errors_is_the_one_that_is_named():
    """The later one may follow from it."""
    trainer: Any = SimpleNamespace(world=DistributedContext.single(), progress=Progress(step=3))
    callbacks = CallbackList([Failing("on_step_end", 0, ValueError("cause")), Failing("on_step_end", 0, KeyError("effect"))])
    callbacks.call("on_step_end", trainer, None)
    callbacks.call("close", trainer, None)
    with pytest.raises(CallbackError, match=r"Failing\.on_step_end failed: ValueError: cause"):
        callbacks.raise_error(trainer)
