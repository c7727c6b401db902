"""The same through the command: two kills and some signals. All else is injected into forked processes, which are quicker."""

import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file

from dist_trainer.run.configure import load_config
from tests.end_to_end.commands import ROOT, SMALL, environment, lines, status
from tests.faults.faults import Run
from tests.faults.processes import wait_until

RUN = [
    *(*SMALL, "--train.max_steps", "40", "--batch.micro_batch_size", "8", "--schedule.name", "tests.slurm.pace:cosine"),
    *("--checkpoint.every_steps", "3", "--checkpoint.keep_last", "3", "--tracking.sample_tokens", "0"),
]
SLOW = {"SLOW_FROM_STEP": "9", "SLOW_SECONDS": "0.3"}
"""So that a run has not finished before it is killed, however seldom a busy machine looks at it."""
SECONDS_OF_A_START = 3.0
PATIENCE = 110.0
"""Seconds until a command has begun to train."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = Run(load_config([*RUN, "--output_dir", str(tmp_path_factory.mktemp("undisturbed"))]))
    run.finish()
    return run.folder


def logged(folder):
    """How many lines stand in the metrics."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@contextmanager
def started(output, **variables):
    """The command, running; killed at the end where it still does."""
    words = [sys.executable, "-m", "dist_trainer.train", *RUN, "--output_dir", str(output)]
    with subprocess.Popen(words, cwd=ROOT, env=environment(**variables), stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def leaves_with(code, process):
    """Whatever signals come: it has saved, or finished; for some tenths of a second its process is still there."""
    for pause in (0.0, 0.1):  # no third one: that ends it at once, as a user wants, until its outcome is final
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    assert process.wait() == code


def test_the_command_survives_a_kill_in_its_start_one_in_a_save_and_signals_until_its_end_as_if_nothing_had_happened(
    undisturbed, tmp_path
):
    folder = tmp_path / "debug"

    def has(state):
        return (folder / "status.json").exists() and status(folder)["state"] == state

    with started(tmp_path, **SLOW) as process:
        moment = time.monotonic() + random.uniform(0, SECONDS_OF_A_START)
        wait_until(lambda: time.monotonic() > moment or logged(folder) > 0, of=process)
        process.kill()
    with started(tmp_path, **SLOW) as process:
        # A machine that is too busy to look while a save lasts kills after one.
        moments = ("checkpoints/.staging-step-*", "checkpoints/step-00000006")
        wait_until(lambda: any(any(folder.glob(moment)) for moment in moments) or process.poll() is not None, seconds=PATIENCE)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    with started(tmp_path, **SLOW) as process:
        # The start cuts the metrics back to the checkpoint, which is a change; the next one is a step.
        for _ in range(2):
            before = logged(folder)
            wait_until(lambda: logged(folder) != before or process.poll() is not None, seconds=PATIENCE)  # noqa: B023
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: has("preempted"), seconds=PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert (folder / "checkpoints" / f"step-{status(folder)['step']:08d}").is_dir()
    with started(tmp_path) as process:
        wait_until(lambda: has("finished"), seconds=PATIENCE)
        leaves_with(0, process)
    for kind in ("train", "validation"):
        ours, theirs = ([(line["step"], line["loss"]) for line in lines(path, kind)] for path in (folder, undisturbed))
        assert ours == theirs
    ours, theirs = (load_file(path / "checkpoints" / "latest" / "model.safetensors") for path in (folder, undisturbed))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
