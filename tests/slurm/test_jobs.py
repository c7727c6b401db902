"""slurm/train.sh on a real cluster: real slurmctld, slurmd and munge, real signals, real loss of nodes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.commands import ROOT, lines, status
from tests.slurm.jobs import SLOW_FROM_STEP, SPACES, STEPS, Cluster, Job

# By a signal, not from a thread: that would end pytest before the cluster is taken down.
pytestmark = pytest.mark.timeout(1200, method="signal")
SLOW = {"SLOW_FROM_STEP": str(SLOW_FROM_STEP)}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "the runs"


def assert_as_if_undisturbed(job: Job, undisturbed: Path) -> None:
    """Every step once, every loss the same."""
    assert [line["step"] for line in lines(job.run)] == list(range(1, STEPS + 1))
    for kind in ("train", "validation"):
        assert [line["loss"] for line in lines(job.run, kind)] == [line["loss"] for line in lines(undisturbed, kind)]
    assert status(job.run)["state"] == "finished"


def step_resumed_from(job: Job) -> int:
    events = map(json.loads, (job.run / "logs/events.jsonl").read_text().splitlines())
    return [event["step"] for event in events if event["event"] == "resume"][-1]


def logs(job: Job) -> list[str]:
    """Names of the ranks' logs, without the job's number."""
    return sorted(path.name.removeprefix(f"job-{job.number}-") for path in job.run.glob("logs/job-*"))


def test_a_job_of_two_nodes_saves_and_requeues_itself_when_its_time_is_nearly_up_and_completes_as_if_undisturbed(
    cluster: Cluster, undisturbed: Path, output: Path
) -> None:
    one_rank_each = ("--gres=gpu:1",)
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, options=one_rank_each, SBATCH_SIGNAL="B:USR1@9", **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    job.signal_shell("USR1")
    job.wait_for_log("stopped early: requeueing the job")
    saved = status(job.run)
    assert saved["state"] == "preempted"
    assert (job.run / f"checkpoints/step-{saved['step']:08}").is_dir(), "no step is lost"
    job.wait_for("COMPLETED", restarts=1)
    assert_as_if_undisturbed(job, undisturbed)
    assert step_resumed_from(job) == saved["step"]
    # Each node has a separate log in each attempt, and arguments with spaces arrive unsplit.
    assert logs(job) == sorted(f"try-{attempt}-node{node}.log" for attempt in (0, 1) for node in (9, 10))
    assert "--nproc-per-node=1 --nnodes=2" in (job.run / f"logs/job-{job.number}-try-1-node10.log").read_text()
    assert yaml.safe_load((job.run / "config.yaml").read_text())["tracking"]["sample_prompt"] == SPACES
    # The second attempt knows how long a save takes, and that 9 s would not be enough.
    assert re.search(r"try 1. WARNING: this run needs 3\d s to save and exit, but has 9 s .SBATCH_SIGNAL is", job.log())


def test_scancel_saves_and_the_job_is_not_resurrected(cluster: Cluster, output: Path) -> None:
    """Submitted as on clusters whose jobs get nothing of the user's environment: nor do the steps in them, by default."""
    exported = ",".join(f"{name}={value}" for name, value in {"PYTHON": sys.executable, **SLOW}.items())
    job = cluster.train(output, options=("--gres=gpu:1", f"--export={exported}"))
    job.wait_for_step(SLOW_FROM_STEP)
    job.cancel()
    job.wait_for("CANCELLED")
    left = status(job.run)
    assert left["state"] == "preempted", job.story()
    assert left["step"] >= SLOW_FROM_STEP
    assert (job.run / f"checkpoints/step-{left['step']:08}").is_dir()
    job.wait_for_log("terminating")
    assert "requeue" not in job.log()
    assert not cluster.user("squeue", "--noheader")


@pytest.mark.slow
def test_a_failing_rank_fails_the_job(cluster: Cluster, output: Path) -> None:
    """On nodes without GPUs, as slurm/README.md has it."""
    job = cluster.train(output, options=("--gres=none",), NPROC="2", FAIL_RANK="3", FAIL_AT_STEP="4")
    job.wait_for("FAILED")
    assert "RuntimeError: failing on purpose" in (job.run / f"logs/job-{job.number}-try-0-node10.log").read_text()
    assert "requeueing the job" not in job.log()


@pytest.mark.slow
def test_a_preempted_job_saves_makes_room_and_resumes_later(cluster: Cluster, undisturbed: Path, output: Path) -> None:
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, options=("--partition=preemptible",), **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    other = cluster.occupy(until=output.parent / "enough")
    other.wait_for("RUNNING")
    job.wait_for("PENDING", restarts=1)
    assert status(job.run)["state"] == "preempted"
    (output.parent / "enough").touch()
    job.wait_for("COMPLETED", restarts=1)
    assert_as_if_undisturbed(job, undisturbed)


@pytest.mark.slow
def test_a_job_that_slurm_itself_requeues_resumes_once(cluster: Cluster, undisturbed: Path, output: Path) -> None:
    """As it does without grace time, or if an administrator asks for it."""
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    cluster.user("scontrol", "requeue", job.number)
    job.wait_for("COMPLETED", restarts=1)
    assert_as_if_undisturbed(job, undisturbed)
    assert job.metadata["Restarts"] == "1"
    assert "requeueing the job" not in job.log()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["preempted", "signalled before the time limit"])
def test_a_job_goes_back_to_the_queue_even_before_it_has_anything_to_save(
    cluster: Cluster, undisturbed: Path, output: Path, what: str
) -> None:
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, options=("--partition=preemptible",))
    # torchrun has said what it starts; its ranks are still importing.
    log = job.run / f"logs/job-{job.number}-try-0-node9.log"
    job.wait_for_file(log)
    if what == "preempted":
        other = cluster.occupy(until=output.parent / "enough")
        other.wait_for("RUNNING")
        job.wait_for("PENDING", restarts=1)
        (output.parent / "enough").touch()
    else:
        job.signal_shell("USR1")
    job.wait_for("COMPLETED", restarts=1)
    assert_as_if_undisturbed(job, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("node", "ranks_leave_first"), [("node9", False), ("node10", False), ("node10", True)])
def test_a_job_resumes_elsewhere_when_a_node_loses_power(
    cluster: Cluster, undisturbed: Path, output: Path, node: str, ranks_leave_first: bool
) -> None:
    """Of node9 come the shell, the rendezvous and rank 0. SLURM often takes longer than the ranks to give up a node."""
    patience = ("--distributed.hang_timeout_minutes", "0.2") if ranks_leave_first else ()
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, *patience, **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    cluster.cut_power(node)
    job.wait_for("COMPLETED", restarts=1)
    assert "node11" in {log.removeprefix("try-1-").removesuffix(".log") for log in logs(job)}
    assert f"try-1-{node}.log" not in logs(job)
    assert_as_if_undisturbed(job, undisturbed)
    if ranks_leave_first:
        left = (job.run / f"logs/job-{job.number}-try-0-node9.log").read_text()
        assert "on node10" in left
        assert "stopped responding for" in left


@pytest.mark.slow
def test_srun_can_start_the_ranks_instead_of_torchrun(cluster: Cluster, undisturbed: Path, output: Path) -> None:
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, LAUNCHER="srun", **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    job.signal_shell("USR1")
    job.wait_for("COMPLETED", restarts=1)
    assert_as_if_undisturbed(job, undisturbed)
    places = [("node9", 0), ("node9", 1), ("node10", 2), ("node10", 3)]
    assert logs(job) == sorted(f"try-{attempt}-{node}-rank-{rank}.log" for attempt in (0, 1) for node, rank in places)
    assert "torch.distributed.run" not in "".join(path.read_text() for path in job.run.glob("logs/job-*"))


@pytest.mark.slow
def test_a_job_does_not_go_back_to_the_queue_more_often_than_it_may(cluster: Cluster, output: Path) -> None:
    job = cluster.train(output, MAX_TRIES="1", **SLOW)
    job.wait_for_step(SLOW_FROM_STEP)
    job.signal_shell("USR1")
    job.wait_for("FAILED")
    assert "this was try 1 of 1 (MAX_TRIES)" in job.log()
    assert status(job.run)["state"] == "preempted"


@pytest.mark.slow
def test_an_array_of_jobs_is_a_sweep_and_each_task_requeues_alone(cluster: Cluster, output: Path) -> None:
    """By the file and the command of slurm/README.md. The last task bears the number of the array."""
    sweep = (ROOT / "slurm/sweep.txt").read_text().splitlines()
    names = [words[words.index("--run_name") + 1] for words in map(shlex.split, sweep)]
    rates = [float(words[words.index("--optim.learning_rate") + 1]) for words in map(shlex.split, sweep)]
    options = (f"--array=1-{len(sweep)}", "--nodes=1", "--gres=gpu:1")
    array = cluster.train(output, options=options, SWEEP="slurm/sweep.txt", **SLOW)
    tasks = [Job(cluster, f"{array.number}_{number}", output, run_name=name) for number, name in enumerate(names, start=1)]
    last = tasks[-1]
    assert last.metadata["JobId"] == array.number
    last.wait_for_step(SLOW_FROM_STEP)
    last.signal_shell("USR1")
    for rate, task in zip(rates, tasks, strict=True):
        task.wait_for("COMPLETED", restarts=int(task is last))
        assert task.metadata["Restarts"] == str(int(task is last))
        assert [line["step"] for line in lines(task.run)] == list(range(1, STEPS + 1))
        assert max(line["lr"] for line in lines(task.run)) == pytest.approx(rate)


@pytest.mark.slow
def test_slurm_itself_signals_ahead_of_the_time_limit(cluster: Cluster, undisturbed: Path, output: Path) -> None:
    """SLURM looks every half minute, and may signal a minute early."""
    options = ("--time=3", "--signal=B:USR1@60")
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, options=options, **SLOW, SLOW_SECONDS="5")
    job.wait_for("COMPLETED", restarts=1)
    assert "the time limit is near" in job.log()
    assert_as_if_undisturbed(job, undisturbed)


@pytest.mark.slow
def test_a_job_whose_time_is_up_before_its_ranks_have_left_resumes_from_its_last_checkpoint(
    cluster: Cluster, undisturbed: Path, output: Path
) -> None:
    options = ("--time=2", "--signal=B:USR1@1")
    patient = ("--distributed.hang_timeout_minutes", "10")  # or SLURM may come later than the ranks' own watch
    job = cluster.train(output, "--tracking.sample_prompt", SPACES, *patient, options=options, **SLOW, SLOW_SECONDS="300")
    job.wait_for("COMPLETED", restarts=1)
    assert "WARNING: time limit reached before the ranks exited" in job.log()
    assert_as_if_undisturbed(job, undisturbed)
