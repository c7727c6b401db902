"""The language of these tests: inject, run, restart, compare. A fault happens to a real process, which really dies of it.

run.start(kill(at_step=7))
run.finish()
run.equals(undisturbed)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

from dist_trainer.checkpoint import manager
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.run import lifecycle
from dist_trainer.run.cli import run_cli
from dist_trainer.training.trainer import Trainer
from tests.distributed.small_runs import changed, command
from tests.faults.damage import fill, make_room
from tests.faults.file_operations import Operations
from tests.faults.processes import Ended, Process

Fault = Callable[[], None]
"""Called in the run's own process before the run begins: it lays the trap."""


class Run:
    """A whole run, through the same assembly as the command, started as often as a test likes."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / config.run_name
        self.checkpoints = self.folder / "checkpoints"

    def but(self, **changes: Any) -> TrainingConfig:
        """Its config, with some keys changed."""
        return changed(self.config, **changes)

    def delete(self) -> None:
        shutil.rmtree(self.folder)

    def begin(self, *faults: Fault, config: TrainingConfig | None = None, ranks: int = 1) -> Process:
        """The run, started; with several ranks the process leads a group of them."""

        def live() -> int:
            for fault in faults:
                fault()
            if ranks == 1:
                return run_cli(lambda: lifecycle.run(config or self.config))
            os.setpgid(0, 0)
            return max(abs(code or 0) for code in command(config or self.config, ranks))

        return Process(live)

    def start(self, *faults: Fault, config: TrainingConfig | None = None, ranks: int = 1) -> Ended:
        """The run, started, and waited for however it ends."""
        return self.begin(*faults, config=config, ranks=ranks).wait()

    def finish(self, *, ranks: int = 1) -> Ended:
        """The same command once more, to its end."""
        ended = self.start(ranks=ranks)
        assert ended.code == 0, ended.said
        assert self.status()["state"] == "finished"
        return ended

    # ------------------------------------------------------------------------------------ what it left

    def lines(self, kind: str = "train") -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["kind"] == kind]

    def logged_steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0

    def is_saving(self) -> bool:
        return any(self.checkpoints.glob(".staging-step-*"))

    def status(self) -> dict[str, Any]:
        return json.loads((self.folder / "status.json").read_text())

    def saved_steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.checkpoints.glob("step-*"))

    def newest(self) -> Path:
        return self.checkpoints / f"step-{self.saved_steps()[-1]:08d}"

    def resumed_at(self) -> list[int]:
        """Where it began, each time that it did."""
        events = [json.loads(line) for line in (self.folder / "logs" / "events.jsonl").read_text().splitlines()]
        return [event["step"] for event in events if event["event"] in ("start", "resume")]

    def litter(self) -> list[str]:
        """Names that only a write in progress may have."""
        cache = Path(os.environ["DIST_TRAINER_CACHE"])
        hidden = [path for folder in (self.folder, cache) for path in folder.rglob(".*") if path.name != ".lock"]
        return [str(path) for path in hidden]

    def equals(self, other: Run) -> None:
        """Nothing shows that anything has happened: losses, steps, validations, weights and optimizer, bit for bit."""
        for kind in ("train", "validation"):
            ours, theirs = ([(x["step"], x["loss"]) for x in run.lines(kind)] for run in (self, other))
            assert ours == theirs
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (load_file(run.checkpoints / "latest" / file) for run in (self, other))
            assert ours.keys() == theirs.keys()
            assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        assert not self.litter()


# ------------------------------------------------------------------------------------------------ faults


def die() -> None:
    """By SIGKILL, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def await_writes() -> None:
    """No save gives way to a newer one, however slow a busy machine makes the write before it."""
    manager.QUICK_SECONDS = 60.0


def kill(*, at_step: int) -> Fault:
    """SIGKILL as soon as step `at_step` is done."""
    return do(lambda _: die(), at_step=at_step)


def fill_disk(disk: Path, *, at_step: int) -> Fault:
    """No room is left on `disk` once step `at_step` is done, and what was saved before stands there."""

    def act(trainer: Trainer) -> None:
        trainer.checkpoints.wait()
        fill(disk)

    return do(act, at_step=at_step)


def free_disk(disk: Path, *, at_step: int) -> Fault:
    """There is room again once step `at_step` is done, and what was to be saved before has failed."""

    def act(trainer: Trainer) -> None:
        trainer.checkpoints.wait()
        make_room(disk)

    return do(act, at_step=at_step)


def poison_gradient(*, at_step: int, rank: int = 0, value: float = math.nan) -> Fault:
    """The loss of `rank`, and so its gradients, are not finite in step `at_step`."""

    def lay() -> None:
        train_step = Trainer.train_step

        def poisoned_step(trainer: Trainer, *arguments: Any) -> Any:
            loss_function = trainer.loss_function
            if trainer.progress.step == at_step - 1 and trainer.world.rank == rank:
                trainer.loss_function = lambda model, batch: loss_function(model, batch) * value
            result = train_step(trainer, *arguments)
            trainer.loss_function = loss_function
            return result

        Trainer.train_step = poisoned_step

    return lay


def do(act: Callable[[Trainer], Any], *, at_step: int) -> Fault:
    """`act` in the training process, as soon as step `at_step` is done."""

    def lay() -> None:
        train_step = Trainer.train_step

        def step_then_act(trainer: Trainer, *arguments: Any) -> Any:
            result = train_step(trainer, *arguments)
            if trainer.progress.step == at_step:
                act(trainer)
            return result

        Trainer.train_step = step_then_act

    return lay


def before_each_call(act: Callable[[], Any], module: ModuleType | type, name: str) -> Fault:
    """`act` whenever the module's, or class's, function `name` is called, before it does anything."""

    def lay() -> None:
        function = getattr(module, name)

        def act_then_call(*arguments: Any, **named: Any) -> Any:
            act()
            return function(*arguments, **named)

        setattr(module, name, act_then_call)

    return lay


def kill_in_save(*, of_step: int, at_operation: int) -> Fault:
    """SIGKILL before file operation number `at_operation`, counted from 0, of the save of step `of_step`."""
    return in_save(Operations(lambda number, _: die() if number == at_operation else None), of_step=of_step)


def count_operations(run: Run, *, of_step: int) -> int:
    """How many file operations the save of step `of_step` is made of; `run` is run for it, to the end."""
    note = run.folder.parent / "operations.txt"
    assert run.start(in_save(Operations(lambda number, _: note.write_text(str(number + 1))), of_step=of_step)).code == 0
    return int(note.read_text())


def in_save(operations: Operations, *, of_step: int) -> Fault:
    """`operations` sees what the thread that saves step `of_step` does."""

    def lay() -> None:
        save = Trainer._save

        def watched_save(trainer: Trainer) -> None:
            # The thread that writes is started next, if none is writing.
            trainer.checkpoints.wait()
            threading.setprofile(operations if trainer.progress.step == of_step else None)
            save(trainer)

        Trainer._save = watched_save

    return lay
