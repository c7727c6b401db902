"""The language of these tests: inject, run, restart, compare. A fault happens to a real process, which really dies of it.

    run.start(kill(at_step=7))
    run.finish()
    run.equals(undisturbed)

Processes are forked from pytest, which has imported everything, so that one costs half a second and not five.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from dist_trainer import assembly
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.exit_codes import exit_code_of
from dist_trainer.trainer import Trainer
from tests.distributed.small_runs import small_config as _small_config  # noqa: F401  (one source of small configs)

SECONDS_OF_A_RUN = 60.0

Fault = Callable[[], None]
"""Called in the run's own process before the run begins: it lays the trap."""


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    """Its exit code; -9 where it was killed."""
    said: str

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Process:
    """A forked process that does `act` and leaves with the exit code that it gives."""

    def __init__(self, act: Callable[[], int], said: Path) -> None:
        self._said = said
        self._status: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: none of them holds a lock
            self.pid = os.fork()
        if self.pid == 0:
            _live(act, said)

    def is_running(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.is_running():
            os.kill(self.pid, number)

    def wait(self, seconds: float = SECONDS_OF_A_RUN) -> Ended:
        end = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"still running after {seconds} s:\n{self._said.read_text()}")
            time.sleep(0.002)
        assert self._status is not None
        return Ended(os.waitstatus_to_exitcode(self._status), self._said.read_text(errors="replace"))


def _live(act: Callable[[], int], said: Path) -> None:
    code = 1
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = open(out, "w", buffering=1)  # noqa: SIM115
        torch.set_num_threads(1)
        code = act()
    finally:
        os._exit(code)


class Run:
    """A whole run, through the same assembly as the command, started as often as a test likes."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / config.run_name
        self.checkpoints = self.folder / "checkpoints"

    def begin(self, *faults: Fault, config: TrainingConfig | None = None) -> Process:
        """The run, started."""

        def live() -> int:
            for fault in faults:
                fault()
            return exit_code_of(lambda: assembly.run(config or self.config))

        output = Path(self.config.output_dir)
        return Process(live, output.parent / f"said-{output.name}-{self.config.run_name}.txt")

    def start(self, *faults: Fault, config: TrainingConfig | None = None) -> Ended:
        """The run, started, and waited for however it ends."""
        return self.begin(*faults, config=config).wait()

    def finish(self) -> Ended:
        """The same command once more, to its end."""
        ended = self.start()
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


def kill(*, at_step: int) -> Fault:
    """SIGKILL as soon as step `at_step` is done."""
    return do(die, at_step=at_step)


def do(act: Callable[[], Any], *, at_step: int) -> Fault:
    """`act` in the training process, as soon as step `at_step` is done."""

    def lay() -> None:
        train_step = Trainer.train_step

        def step_then_act(trainer: Trainer, *arguments: Any) -> Any:
            result = train_step(trainer, *arguments)
            if trainer.progress.step == at_step:
                act()
            return result

        Trainer.train_step = step_then_act

    return lay


def kill_in_save(*, of_step: int, at_operation: int) -> Fault:
    """SIGKILL before file operation number `at_operation` of the save of step `of_step`."""
    return during_save(die, of_step=of_step, at_operation=at_operation)


def during_save(act: Callable[[], Any], *, of_step: int, at_operation: int) -> Fault:
    """`act` in the thread that saves step `of_step`, before its file operation number `at_operation`, counted from 0."""

    def lay() -> None:
        take_snapshot = Trainer._take_snapshot
        watch = Operations(lambda number, _: act() if number == at_operation else None)

        def take(trainer: Trainer) -> Any:
            # The thread that writes is started next.
            threading.setprofile(watch if trainer.progress.step == of_step else None)
            return take_snapshot(trainer)

        Trainer._take_snapshot = take

    return lay


CHANGING = {
    *("open", "write", "writelines", "flush", "close", "truncate", "fsync", "chmod", "mkdir", "rmdir", "unlink", "remove"),
    *("rename", "replace", "symlink", "serialize_file", "save", "ftruncate", "pwrite"),
}
OF_MODULES = ("posix", "_io", "io", "tokenizers", "safetensors")


class Operations:
    """A profile function that counts, in its thread, calls that change files, and tells of each before it happens."""

    def __init__(self, before: Callable[[int, str], Any]) -> None:
        self.before = before
        self.count = 0

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or function.__name__ not in CHANGING:
            return
        owner = getattr(function, "__self__", None)
        module = getattr(function, "__module__", None) or type(owner).__module__
        if module.split(".")[0] in OF_MODULES or type(owner).__module__.split(".")[0] in OF_MODULES:
            number, self.count = self.count, self.count + 1
            self.before(number, function.__name__)


# ------------------------------------------------------------------------------------------------ damage


def flip_bit(path: Path, rng: random.Random | None = None) -> None:
    """One bit, anywhere in the file."""
    rng = rng or random.Random(path.name)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """The last byte is gone."""
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    """No byte is left."""
    path.write_bytes(b"")


def delete(path: Path) -> None:
    """Nor a name."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {"flip_bit": flip_bit, "truncate": truncate, "empty": empty, "delete": delete}


# ------------------------------------------------------------------------------------------------ disks


def fill(disk: Path, *, but_for: int = 0) -> None:
    """Take all room that `disk` has, but for so many bytes."""
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "ballast").open("ab", buffering=0) as file:
        left = room - but_for
        while left > 0:
            try:
                left -= file.write(b"\0" * min(left, 1 << 16))
            except OSError:
                break


def make_room(disk: Path) -> None:
    """Give it back."""
    (disk / "ballast").unlink()
