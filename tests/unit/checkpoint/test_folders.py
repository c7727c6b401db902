"""Which folders are checkpoints of a run: never those that a link leads to outside of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.checkpoint import manager
from dist_trainer.checkpoint.folders import find_checkpoint, latest_valid, step_folders
from dist_trainer.checkpoint.manager import CheckpointManager
from dist_trainer.checkpoint.state import Progress, Snapshot
from dist_trainer.config.schema import CheckpointConfig
from dist_trainer.errors import CheckpointError


def write_weights(_: Any, folder: Path) -> None:
    (folder / "weights").write_text("weights")


def save(folder: Path, *steps: int) -> Path:
    """Checkpoints with almost nothing in them."""
    checkpoints = CheckpointManager(folder, CheckpointConfig(keep_last=10), save_model_fn=write_weights)
    for step in steps:
        checkpoints.save(lambda step=step: Snapshot({}, {}, {}, {}, Progress(step)), is_best=False, before_publish=lambda: None)
        checkpoints.wait()
    assert checkpoints.last_error is None
    return folder


def test_a_link_out_of_the_run_is_no_folder_of_checkpoints(tmp_path):
    run, outside = tmp_path / "run", save(tmp_path / "outside", 4)
    run.mkdir()
    (run / "checkpoints").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"run is neither a checkpoint nor a run folder with checkpoints"):
        find_checkpoint(run)
    (run / "checkpoints").unlink()
    shutil.copytree(outside, run / "inside")
    (run / "checkpoints").symlink_to("inside")
    assert find_checkpoint(run).name == "step-00000004"


def test_a_link_is_no_checkpoint_whatever_its_name(tmp_path):
    run, outside = save(tmp_path / "run", 4), save(tmp_path / "outside", 8)
    (run / "step-00000008").symlink_to(outside / "step-00000008")
    assert [path.name for path in step_folders(run)] == ["step-00000004"]
    assert latest_valid(run) == run / "step-00000004"


def test_a_checkpoint_in_another_format_is_skipped(tmp_path, monkeypatch, caplog):
    save(tmp_path, 4)
    monkeypatch.setattr(manager, "FORMAT_VERSION", 2)
    save(tmp_path, 8)
    assert latest_valid(tmp_path) == tmp_path / "step-00000004"
    assert "step-00000008 has format version 2, not 1" in caplog.text
