"""What of the memory's history is written, as far as it shows without a GPU."""

from pathlib import Path

import pytest
import torch

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.training.profiler import _Recording


@pytest.mark.parametrize("fails", [False, True])
def test_a_history_that_cannot_be_written_is_no_longer_kept_and_leaves_no_file(tmp_path, monkeypatch, fails):
    kept = [True]

    def dump(path: str) -> None:
        Path(path).write_bytes(b"half of it")
        if fails:
            raise OSError("no space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *, enabled: kept.append(bool(enabled)))
    recording = _Recording.__new__(_Recording)  # without torch's profiler
    recording._world, recording._folder = DistributedContext(device=torch.device("cuda")), tmp_path / "profile"
    monkeypatch.setattr(recording, "_stop", lambda: None)
    recording.break_off(range(3, 5))
    assert kept == [True, False]
    assert [path.name for path in recording._folder.iterdir()] == ([] if fails else ["steps-3-4-rank0.memory.pickle"])
