"""Faults under a real torchrun, started by launch/local.sh: a rank dies, signals come, the launcher dies alone."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_trainer.run.configure import load_config
from dist_trainer.storage.processes import ProcessId, environment_of
from tests.distributed import small_runs
from tests.end_to_end.commands import ROOT, SMALL, environment, lines, status
from tests.faults.processes import children_of, wait_until

STEPS = 40
RUN = [
    *(*SMALL, "--tracking.sample_tokens", "0", "--train.max_steps", str(STEPS)),
    *("--batch.micro_batch_size", "2", "--precision.compile", "false", "--schedule.name", "tests.slurm.pace:cosine"),
]
SLOW = {"SLOW_FROM_STEP": "6", "SLOW_SECONDS": "0.3"}
"""So that a run has not finished before anything happens to it, however seldom a busy machine looks at it."""
SECONDS_TO_LEAVE = 10
SECONDS_TO_LEAVE_A_HANGING_RANK = 20
SECONDS_TO_START = 20
TIMEOUT_MINUTES = 0.1
LOCAL = (str(ROOT / "launch/local.sh"),)
BARE = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_trainer.train")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    config = load_config([*RUN, "--output_dir", str(output)])
    assert small_runs.run(config, 2) == [0, 0]
    return output / "debug"


@contextmanager
def launched(output: Path, *arguments: str, ranks: int = 2, by: tuple[str, ...] = LOCAL, **options: str):
    """launch/local.sh, which becomes torchrun; its process and those of its ranks are gone at the end."""
    words = [*by, *RUN, "--output_dir", str(output), *arguments]
    settings = environment(PYTHON=sys.executable, NPROC=str(ranks), **options)
    with (output / "said.txt").open("ab") as said, subprocess.Popen(words, env=settings, stdout=said, stderr=said) as process:
        try:
            yield process
        finally:
            for rank in ranks_of(process):
                rank.kill()
            process.kill()


def ranks_of(launcher: subprocess.Popen) -> list[ProcessId]:
    """By rank. The launch file starts other processes first, and a child that has not called exec yet is still torchrun."""
    environments = {pid: environment_of(pid) for pid in children_of(launcher.pid)}
    ranks = {int(variables["RANK"]): pid for pid, variables in environments.items() if "RANK" in variables}
    return [ProcessId.of(pid) for _, pid in sorted(ranks.items())]


def ranks_that_have_just_been_started(launcher: subprocess.Popen, *, ranks: int = 2) -> list[ProcessId]:
    wait_until(lambda: len(ranks_of(launcher)) == ranks, seconds=90, of=launcher)
    return ranks_of(launcher)


def logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGTERM),
        pytest.param((signal.SIGTERM, signal.SIGINT), marks=pytest.mark.slow),
        pytest.param((signal.SIGUSR1, signal.SIGUSR1), marks=pytest.mark.slow),
    ],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
def test_signals_a_killed_launcher_and_a_killed_rank_cost_no_more_than_the_steps_since_the_last_checkpoint(
    undisturbed, tmp_path, ranks, numbers
):
    a_killed_torchrun_leaves_no_orphans(tmp_path, ranks)
    a_killed_rank_is_restarted_by_torchrun_and_a_signal_saves_that_very_step(tmp_path, ranks, numbers)
    assert small_runs.run(load_config([*RUN, "--output_dir", str(tmp_path)]), ranks) == [0] * ranks
    assert status(tmp_path / "debug")["state"] == "finished"
    assert status(tmp_path / "debug")["restarts"] == 3
    assert [line["step"] for line in lines(tmp_path / "debug")] == list(range(1, STEPS + 1))
    if ranks == 2:
        assert losses(tmp_path / "debug") == losses(undisturbed)


def a_killed_torchrun_leaves_no_orphans(output, ranks):
    folder = output / "debug"
    with launched(output, ranks=ranks, **SLOW) as launcher:
        wait_until(lambda: logged(folder) >= 5, seconds=90, of=launcher)
        processes = ranks_of(launcher)
        assert len(processes) == ranks
        launcher.kill()
        wait_until(lambda: not any(process.is_alive() for process in processes), seconds=SECONDS_TO_LEAVE)
    step = lines(folder)[-1]["step"]
    assert (status(folder)["state"], status(folder)["step"]) == ("failed", step)
    reason = f"the launcher (pid {launcher.pid}) is gone; step {step} is saved"
    assert status(folder)["reason"].startswith(reason)
    assert (output / "said.txt").read_text().count(f"dist_trainer: {reason}") == 1
    assert os.readlink(folder / "checkpoints" / "latest") == f"step-{step:08d}"


def a_killed_rank_is_restarted_by_torchrun_and_a_signal_saves_that_very_step(output, ranks, numbers):
    folder = output / "debug"
    with launched(output, ranks=ranks, MAX_RESTARTS="1", **SLOW) as launcher:
        wait_until_training(folder, restarts=1, of=launcher)
        killed = ranks_of(launcher)
        killed[1].kill()
        wait_until_training(folder, restarts=2, of=launcher)
        processes = ranks_of(launcher)
        assert len(processes) == ranks
        assert not [process for process in killed if process.is_alive()]
        for number in numbers:  # the second one does no harm; it comes later, or the two might merge
            launcher.send_signal(number)
            time.sleep(0.2)
        wait_until(lambda: launcher.poll() is not None, seconds=SECONDS_TO_LEAVE)
        assert not [process for process in processes if process.is_alive()]
    assert status(folder)["state"] == "preempted"
    # Under load a rank may be told of the second one first.
    assert status(folder)["reason"] in {number.name for number in numbers}
    assert status(folder)["step"] == lines(folder)[-1]["step"]
    assert os.readlink(folder / "checkpoints" / "latest") == f"step-{status(folder)['step']:08d}"


def wait_until_training(folder, *, restarts, of):
    """Until a run that was restarted so often has done a step more."""
    is_running = lambda: (status(folder)["state"], status(folder)["restarts"]) == ("running", restarts)  # noqa: E731
    wait_until(is_running, seconds=90, of=of)
    before = logged(folder)
    wait_until(lambda: logged(folder) > before, seconds=90, of=of)


@pytest.mark.slow  # above, one that is killed while they train
def test_ranks_whose_torchrun_dies_of_a_signal_save_and_leave(tmp_path):
    """Without the launch file's option torchrun does not take SIGUSR1, which ends it at once."""
    number = signal.SIGUSR1
    folder = tmp_path / "debug"
    with launched(tmp_path, "--train.max_steps", "100000", "--checkpoint.every_steps", "50000", by=BARE, **SLOW) as launcher:
        wait_until(lambda: logged(folder) >= 5, seconds=90, of=launcher)
        processes = ranks_of(launcher)
        launcher.send_signal(number)
        assert launcher.wait(SECONDS_TO_LEAVE) == -number
        wait_until(lambda: not any(process.is_alive() for process in processes), seconds=SECONDS_TO_LEAVE)
    step = lines(folder)[-1]["step"]
    assert os.readlink(folder / "checkpoints" / "latest") == f"step-{step:08d}"
    reason = f"the launcher (pid {launcher.pid}) is gone; step {step} is saved"
    assert (status(folder)["state"], status(folder)["step"]) == ("failed", step)
    assert status(folder)["reason"].startswith(reason)
    assert (tmp_path / "said.txt").read_text().count(f"dist_trainer: {reason}") == 1


def test_ranks_whose_torchrun_dies_while_they_start_do_not_train_without_it(tmp_path):
    with launched(tmp_path, "--train.max_steps", "100000") as launcher:
        processes = ranks_that_have_just_been_started(launcher)
        launcher.kill()
        try:
            wait_until(lambda: not any(process.is_alive() for process in processes), seconds=SECONDS_TO_LEAVE)
        finally:
            for process in processes:
                process.kill()
    assert (tmp_path / "said.txt").read_text().count(f"the launcher (pid {launcher.pid}) is gone") == 1


@pytest.mark.slow  # tests/distributed/test_rendezvous.py has ranks that do not join
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_frozen_while_it_starts_is_named_and_all_leave(tmp_path, victim):
    with launched(tmp_path, "--distributed.hang_timeout_minutes", str(TIMEOUT_MINUTES)) as launcher:
        processes = ranks_that_have_just_been_started(launcher)
        time.sleep(0.5)
        os.kill(processes[victim].pid, signal.SIGSTOP)
        seconds = SECONDS_TO_START + 60 * TIMEOUT_MINUTES + SECONDS_TO_LEAVE_A_HANGING_RANK
        wait_until(lambda: launcher.poll() is not None, seconds=seconds)
        assert not [process for process in processes if process.is_alive()]
    said = (tmp_path / "said.txt").read_text()
    assert said.count(" within 6 s (distributed.hang_timeout_minutes)") == 1, said
    assert f"dist_trainer: rank {victim} did not join the rendezvous at " in said


@pytest.mark.slow
def test_a_job_suspended_entirely_for_longer_than_the_timeout_continues(undisturbed, tmp_path):
    """By a scheduler that takes turns, or in a container that is paused: launcher, ranks, and all that they have started."""
    folder = tmp_path / "debug"
    slow = {"SLOW_FROM_STEP": "2", "SLOW_SECONDS": "0.3"}
    with launched(tmp_path, "--distributed.hang_timeout_minutes", str(TIMEOUT_MINUTES), **slow) as launcher:
        wait_until(lambda: logged(folder) >= 2, seconds=90, of=launcher)
        children = children_of(launcher.pid)
        job = [launcher.pid, *children, *(pid for child in children for pid in children_of(child))]
        assert len(job) >= 1 + 2, "two ranks"
        try:
            for pid in job:
                os.kill(pid, signal.SIGSTOP)
            before = logged(folder)
            time.sleep(60 * TIMEOUT_MINUTES + 10)
        finally:
            for pid in job:
                os.kill(pid, signal.SIGCONT)
        assert launcher.wait() == 0, (tmp_path / "said.txt").read_text()
    assert before < STEPS
    assert losses(folder) == losses(undisturbed)
