"""`python -m tests.faults.many_kills [KILLS]`: 200 kills at random instants, half of them inside the write of a checkpoint.

A run is killed ten times, then let finish and compared with one that nothing happened to; then the next run. Prints what
docs/reliability.md quotes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.distributed.small_runs import write_stories
from tests.faults.faults import Run
from tests.faults.processes import wait_until

KILLS = 200
KILLS_OF_A_RUN = 10
SECONDS_OF_A_WRITE = 0.06
SECONDS_BETWEEN_WRITES = 0.12


def kill_at_a_random_instant(run: Run, rng: random.Random, *, while_saving: bool) -> bool:
    """Start `run` and kill it: soon after a write of a checkpoint has begun, or after any line of its metrics.

    Whether it was killed at that: a run may be at its end before.
    """
    process = run.begin()
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


def due(run: Run) -> int:
    """The last step up to which, by what is logged, a checkpoint must be there: the one before may be in flight."""
    return max(0, run.logged_steps() // 3 * 3 - 3)


def main(kills: int = KILLS) -> int:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from tests.faults.conftest import a_run  # imports all that a run needs, before the first fork

    began = time.monotonic()
    rng = random.Random(kills)
    counts = {"inside a write": 0, "elsewhere": 0, "restarts": 0, "runs": 0}
    lost: list[int] = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["DIST_TRAINER_CACHE"] = f"{place}/cache"
        text = write_stories(Path(place) / "stories.jsonl")
        undisturbed = a_run(text, Path(place) / "undisturbed")
        undisturbed.finish()
        while counts["inside a write"] + counts["elsewhere"] < kills:
            run = a_run(text, Path(place) / f"runs-{counts['runs']}")
            for _ in range(KILLS_OF_A_RUN):
                while_saving = counts["inside a write"] <= counts["elsewhere"]
                if kill_at_a_random_instant(run, rng, while_saving=while_saving):
                    counts["inside a write" if while_saving else "elsewhere"] += 1
                logged, saved = run.logged_steps(), run.saved_steps()
                lost.append(logged - (saved[-1] if saved else 0))
                assert (saved[-1] if saved else 0) >= due(run), f"{saved} is saved of {logged} steps"
                counts["restarts"] += 1
            run.finish()
            run.equals(undisturbed)
            run.delete()
            counts["runs"] += 1
            print(f"{time.monotonic() - began:6.0f} s  {json.dumps(counts)}", flush=True)
    print(f"all went on by themselves; {counts['runs']} runs equal the undisturbed one bit for bit")
    print(f"steps done again after a kill: median {statistics.median(lost):g}, at most {max(lost)} (saved every 3)")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
