"""The same through the command: one kill and one signal. All else is injected into forked processes, which are quicker."""

import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file

from tests.end_to_end.commands import ROOT, SMALL, environment, lines, status
from tests.end_to_end.forked_commands import quick_command
from tests.faults.processes import wait_until

OFTEN = ["--checkpoint.every_steps", "3", "--checkpoint.keep_last", "3", "--tracking.sample_tokens", "0"]


LONG = ["--train.max_steps", "80"]
"""Seconds of training, so that a run has not finished before it is killed."""
SECONDS_OF_A_START = 3.0
PATIENCE = 110.0
"""Seconds until a command has begun to train."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    done = quick_command(*SMALL, *OFTEN, *LONG, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    return output / "debug"


def logged(folder):
    """How many lines stand in the metrics."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@contextmanager
def started(output, *arguments):
    """The command, running; killed at the end where it still does."""
    words = [sys.executable, "-m", "dist_trainer.train", *SMALL, *OFTEN, "--output_dir", str(output), *arguments]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_command_survives_a_kill_in_its_start_one_in_a_save_and_a_signal_as_if_nothing_had_happened(undisturbed, tmp_path):
    folder = tmp_path / "debug"
    with started(tmp_path, *LONG) as process:
        moment = time.monotonic() + random.uniform(0, SECONDS_OF_A_START)
        wait_until(lambda: time.monotonic() > moment or logged(folder) > 0, of=process)
        process.kill()
    with started(tmp_path, *LONG) as process:
        # A machine that is too busy to look while a save lasts kills after one.
        moments = ("checkpoints/.staging-step-*", "checkpoints/step-00000006")
        wait_until(lambda: any(any(folder.glob(moment)) for moment in moments) or process.poll() is not None, seconds=PATIENCE)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    with started(tmp_path, *LONG) as process:
        # The start cuts the metrics back to the checkpoint, which is a change; the next one is a step.
        for _ in range(2):
            before = logged(folder)
            wait_until(lambda: logged(folder) != before or process.poll() is not None, seconds=PATIENCE)  # noqa: B023
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75
    assert status(folder)["state"] == "preempted"
    assert (folder / "checkpoints" / f"step-{status(folder)['step']:08d}").is_dir()
    assert quick_command(*SMALL, *OFTEN, *LONG, "--output_dir", tmp_path).returncode == 0
    for kind in ("train", "validation"):
        ours, theirs = ([(line["step"], line["loss"]) for line in lines(path, kind)] for path in (folder, undisturbed))
        assert ours == theirs
    ours, theirs = (load_file(path / "checkpoints" / "latest" / "model.safetensors") for path in (folder, undisturbed))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def test_signals_to_a_command_whose_outcome_is_decided_do_not_change_its_exit_code(tmp_path):
    """It has saved, or finished, and says so; for some tenths of a second its process is still there."""

    def leaves_with(code, process):
        for pause in (0.1, 0.2, 0.2):
            time.sleep(pause)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        assert process.wait() == code

    def has(state):
        return (tmp_path / "debug" / "status.json").exists() and status(tmp_path / "debug")["state"] == state

    with started(tmp_path, "--train.max_steps", "100000") as process:
        wait_until(lambda: logged(tmp_path / "debug") > 0, of=process, seconds=PATIENCE)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: has("preempted"), seconds=PATIENCE)
        leaves_with(75, process)
    with started(tmp_path, "--train.max_steps", str(status(tmp_path / "debug")["step"] + 3)) as process:
        wait_until(lambda: has("finished"), seconds=PATIENCE)
        leaves_with(0, process)
