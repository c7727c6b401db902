"""`python -m tests.faults.many_kills [KILLS]`: 200 kills at random instants, half of them inside the write of a checkpoint.

A run is killed ten times, then let finish and compared with one that nothing happened to; then the next run. A tenth as many
kills each go to whole groups of two ranks, and to the command itself, at any time from their start to their end. Prints what
docs/reliability.md quotes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dist_trainer.config.loading import dump_config
from tests.distributed.small_runs import write_stories
from tests.faults.faults import Run, await_writes
from tests.faults.processes import Process, kill_group, wait_until

KILLS = 200
KILLS_OF_A_RUN = 10
SECONDS_OF_A_WRITE = 0.06
SECONDS_BETWEEN_WRITES = 0.12
ROOT = Path(__file__).parents[2]


def kill_at_a_random_instant(run: Run, rng: random.Random, *, while_saving: bool) -> bool:
    """Start `run` and kill it: soon after a write of a checkpoint has begun, or after any line of its metrics.

    Whether it was killed at that: a run may be at its end before.
    """
    process = run.begin(await_writes)
    before = run.logged_steps()
    if while_saving:
        wait_until(lambda: run.is_saving() or not process.is_running())
        threading.Event().wait(rng.uniform(0, SECONDS_OF_A_WRITE))
    else:
        # At the start, the file of metrics is cut back to the checkpoint: any change tells that training goes on.
        wait_until(lambda: run.logged_steps() != before or not process.is_running())
        threading.Event().wait(rng.uniform(0, SECONDS_BETWEEN_WRITES))
    inside_a_write = run.is_saving()
    process.kill()
    ended = process.wait()
    assert ended.was_killed or ended.code == 0, ended.said
    return ended.was_killed and (inside_a_write or not while_saving)


def kill_at_any_time(process: Process | subprocess.Popen[bytes], rng: random.Random, *, seconds: float) -> None:
    """Kill `process`, which was just started, and all that it has started: while it imports, prepares, trains or leaves,
    as likely in each of the `seconds` that it takes undisturbed.
    """
    threading.Event().wait(rng.uniform(0, seconds))
    kill_group(process)
    process.wait()


def seconds_of(start: Callable[[], Process | subprocess.Popen[bytes]]) -> float:
    """How long a process takes that nothing happens to."""
    began = time.monotonic()
    start().wait()
    return time.monotonic() - began


def begin_command(run: Run) -> subprocess.Popen[bytes]:
    """`run` by the command itself, which imports everything again."""
    config = run.folder.parent / "config.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(dump_config(run.config))
    words = [sys.executable, "-m", "dist_trainer.train", "--config", str(config)]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)


def due(run: Run) -> int:
    """The last step up to which, by what is logged, a checkpoint must be there: the one before may be in flight."""
    return max(0, run.logged_steps() // 3 * 3 - 3)


class Campaign:
    """Runs to be killed, one after another, in a folder of their own."""

    def __init__(self, make: Callable[[Path], Run], place: Path, rng: random.Random) -> None:
        self._make, self._place, self._rng = make, place, rng
        self.runs = 0
        self.lost: list[int] = []

    def kill_one_run(self, kill: Callable[[Run], None], kills: int, *, undisturbed: Run, ranks: int = 1) -> None:
        """Kill a new run so many times, let it finish, and compare it."""
        self.runs += 1
        run = self._make(self._place / f"runs-{self.runs}")
        for _ in range(kills):
            kill(run)
            logged, saved = run.logged_steps(), max(run.saved_steps(), default=0)
            self.lost.append(logged - saved)
            assert saved >= due(run), f"{saved} is saved of {logged} steps"
        run.finish(ranks=ranks)
        run.equals(undisturbed)
        run.delete()

    def kill_anywhere(self, start: Callable[[Run], Process | subprocess.Popen[bytes]], kills: int, *, ranks: int) -> None:
        """The same at any time of processes that `start` starts."""
        undisturbed = self._make(self._place / f"undisturbed-{self.runs}")
        seconds = seconds_of(lambda: start(undisturbed))
        undisturbed.finish(ranks=ranks)
        for left in range(kills, 0, -KILLS_OF_A_RUN):
            self.kill_one_run(
                lambda run: kill_at_any_time(start(run), self._rng, seconds=seconds),
                min(left, KILLS_OF_A_RUN),
                undisturbed=undisturbed,
                ranks=ranks,
            )


def main(kills: int = KILLS) -> int:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from tests.faults.conftest import a_run  # imports all that a run needs, before the first fork

    began = time.monotonic()
    rng = random.Random(kills)
    counts = {"inside a write": 0, "elsewhere": 0}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.environ["DIST_TRAINER_CACHE"] = f"{place}/cache"
        text = write_stories(place / "stories.jsonl")
        campaign = Campaign(lambda output: a_run(text, output), place, rng)

        def say(kinds: str) -> None:
            print(f"{time.monotonic() - began:6.0f} s  {kinds}; {campaign.runs} runs equal the undisturbed one", flush=True)

        def kill(run: Run) -> None:
            while_saving = counts["inside a write"] <= counts["elsewhere"]
            if kill_at_a_random_instant(run, rng, while_saving=while_saving):
                counts["inside a write" if while_saving else "elsewhere"] += 1

        undisturbed = a_run(text, place / "undisturbed")
        undisturbed.finish()
        while sum(counts.values()) < kills:
            campaign.kill_one_run(kill, KILLS_OF_A_RUN, undisturbed=undisturbed)
            say(json.dumps(counts))
        campaign.kill_anywhere(lambda run: run.begin(await_writes), kills // 10, ranks=1)
        say(f"{kills // 10} at any time of one process")
        campaign.kill_anywhere(lambda run: run.begin(await_writes, ranks=2), kills // 10, ranks=2)
        say(f"{kills // 10} at any time of two ranks")
        campaign.kill_anywhere(begin_command, kills // 10, ranks=1)
        say(f"{kills // 10} at any time of the command")
    lost = campaign.lost
    print(f"steps done again after a kill: median {statistics.median(lost):g}, at most {max(lost)} (saved every 3)")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
