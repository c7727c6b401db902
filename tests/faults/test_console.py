"""Console lines of a run whose process was forked from one that others were forked from, too."""

import logging
import multiprocessing
import os
import signal

from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

from dist_trainer.tracking.run_log import configure_logging
from tests.faults.processes import Process


def die_while_writing() -> int:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_process_that_is_killed_while_it_writes_blocks_no_other(tmp_path):
    def write_after_such_a_death() -> int:
        TqdmDefaultWriteLock.mp_lock = multiprocessing.RLock()  # other tests have the one before
        tqdm.set_lock(TqdmDefaultWriteLock())
        assert Process(die_while_writing).wait().was_killed
        configure_logging(tmp_path / "logs", rank=0)
        logging.getLogger("dist_trainer").info("still here")
        return 0

    ended = Process(write_after_such_a_death).wait(seconds=10)
    assert ended.code == 0, ended.said
    assert "still here" in ended.said
