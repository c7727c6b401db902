"""What the tests say to the cluster: submit, wait until, signal, cancel, cut a node's power."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.commands import ROOT, SMALL, environment, lines

SCRIPT = Path(__file__).with_name("cluster.sh")
NODES = 3
STEPS = 30
SLOW_FROM_STEP = 6
TRAINING = [
    *(*SMALL, "--batch.micro_batch_size", "2"),
    *("--train.max_steps", str(STEPS), "--checkpoint.every_steps", "5", "--tracking.sample_tokens", "4"),
    *("--schedule.name", "tests.slurm.pace:cosine", "--distributed.backend", "gloo"),
]
SPACES = "It is a truth,  universally acknowledged"
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
PATIENCE_SECONDS = 400.0
"""For what takes some 20 s on a machine with nothing else to do."""


def wait_until(happened: Callable[[], object], *, failing: Callable[[], str], seconds: float = PATIENCE_SECONDS) -> None:
    """Return as soon as `happened()`; after `seconds` fail with what `failing()` says."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, failing()
        time.sleep(0.3)


class Cluster:
    """A running cluster of `NODES` nodes."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def control(self, *words: str | Path, timeout: float = 120, **variables: str) -> str:
        """`cluster.sh words`; its output."""
        done = subprocess.run(
            [SCRIPT, *words],
            env=environment(CLUSTER_STATE=str(self._state), **variables),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def user(self, *words: str | Path, **variables: str) -> str:
        """A command on the login node."""
        return self.control("exec", *words, **variables)

    def boot(self) -> None:
        """Start all that does not run: the cluster, or nodes without power."""
        self.control("up", str(NODES))

    def cut_power(self, node: str) -> None:
        self.control("fail", node)

    def train(self, output: Path, *arguments: str, options: tuple[str, ...] = (), **variables: str) -> Job:
        """`sbatch options slurm/train.sh arguments`: two ranks on each of two nodes, whose runs come into `output`.

        `variables` are of the environment, for the script and for pace.py.
        """
        resources = ("--nodes=2", "--gres=gpu:2", "--cpus-per-task=2", "--time=10")
        words = [*resources, f"--output={output.parent}/slurm-%j.out", *options, "slurm/train.sh"]
        number = self.user(
            *("sbatch", "--parsable", *words, *TRAINING, "--output_dir", str(output), *arguments),
            PYTHON=sys.executable,
            **variables,
        )
        return Job(self, number.strip(), output)

    def occupy(self, until: Path) -> Job:
        """A job of high priority on all nodes, which ends when the file `until` exists."""
        command = f"until [ -e '{until}' ]; do sleep 0.2; done"
        words = ["--partition=train", f"--nodes={NODES}", "--exclusive", "--output=/dev/null", f"--wrap={command}"]
        return Job(self, self.user("sbatch", "--parsable", *words).strip(), until.parent)

    def clear(self) -> None:
        """Cancel what still runs, and wait for its end."""
        self.user("scancel", "--user=root")
        queue = lambda: self.user("squeue", "--noheader", "--all")  # noqa: E731
        wait_until(lambda: not queue(), failing=queue)


class Job:
    """A job on `cluster`; `output` is its output_dir."""

    def __init__(self, cluster: Cluster, number: str, output: Path, *, run_name: str = "debug") -> None:
        self.cluster, self.number, self.output, self.run_name = cluster, number, output, run_name

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.output / self.run_name

    @property
    def metadata(self) -> dict[str, str]:
        """What SLURM says of it: JobState, Restarts, NodeList, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.cluster.user("scontrol", "show", "job", self.number)))

    @property
    def state(self) -> str:
        return self.metadata["JobState"]

    def log(self) -> str:
        """The output of the job script, over all attempts."""
        return (self.output.parent / f"slurm-{self.metadata['JobId']}.out").read_text()

    def story(self) -> str:
        """All there is to know when a test fails."""
        logs = [path.read_text()[-3000:] for path in sorted(self.output.rglob("logs/job-*.log"))]
        return "\n".join([str(self.metadata), self.log(), *logs])

    def wait_for(self, *states: str, restarts: int = 0) -> str:
        """Until it is in one of `states`, after so many restarts; returns which one."""
        self._wait_until(lambda metadata: metadata["JobState"] in states and int(metadata["Restarts"]) >= restarts)
        return self.state

    def wait_for_step(self, step: int) -> None:
        """Until the run has finished so many steps."""
        metrics = self.run / "metrics.jsonl"
        self._wait_until(lambda metadata: metrics.exists() and len(lines(self.run)) >= step)

    def wait_for_file(self, path: Path) -> None:
        """Until `path` exists and is not empty."""
        self._wait_until(lambda metadata: path.exists() and path.stat().st_size)

    def _wait_until(self, happened: Callable[[dict[str, str]], object]) -> None:
        """By SLURM's record of it; fails if the job ends before."""

        def arrived() -> bool:
            metadata = self.metadata
            if happened(metadata):
                return True
            if metadata["JobState"] in OVER:
                raise AssertionError(f"job {self.number} is over: {self.story()}")
            return False

        wait_until(arrived, failing=self.story)

    def wait_for_log(self, part: str) -> None:
        """Until the job script has printed `part`."""
        wait_until(lambda: part in self.log(), failing=self.story)

    def signal_shell(self, name: str) -> None:
        """What SLURM does ahead of the time limit, by --signal=B:NAME@SECONDS."""
        self.cluster.user("scancel", "--batch", f"--signal={name}", self.number)

    def cancel(self) -> None:
        self.cluster.user("scancel", self.number)
