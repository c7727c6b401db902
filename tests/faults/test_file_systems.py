"""File systems that refuse what vfat, CIFS and FUSE mounts refuse, and copies of a run's folder in which no link is left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from dist_trainer.checkpoint.folders import resume_point
from dist_trainer.huggingface.model_files import model_folders
from dist_trainer.storage.manifest import describe_files
from tests.faults.damage import contents, flip_bit
from tests.faults.faults import Fault, do, kill
from tests.faults.saving import Saver


def refuse(function: str, number: int, *, of_folders: bool = False) -> Fault:
    """Every call of `os.<function>` fails with the error `number`; `of_folders`: every call for an open folder."""

    def lay() -> None:
        real = getattr(os, function)

        def refused(*arguments, **named):
            if of_folders and not stat.S_ISDIR(os.fstat(arguments[0]).st_mode):
                return real(*arguments, **named)
            raise OSError(number, os.strerror(number))

        setattr(os, function, refused)

    return lay


def no_locks(number: int) -> Fault:
    def lay() -> None:
        def flock(*_):
            raise OSError(number, os.strerror(number))

        fcntl.flock = flock

    return lay


@pytest.mark.parametrize(
    ("refusals", "said"),
    [
        ([refuse("chmod", errno.EPERM)], None),
        ([refuse("fsync", errno.EPERM, of_folders=True)], "fsync of a folder is refused by this file system"),
        ([refuse("fsync", errno.EACCES)], "fsync is refused by this file system (Permission denied)"),
        ([no_locks(errno.EPERM)], "this file system has no locks"),
    ],
    ids=["chmod", "fsync of folders", "fsync", "locks"],
)
def test_what_a_file_system_refuses_costs_at_most_a_warning(run, undisturbed, tmp_path, monkeypatch, refusals, said):
    monkeypatch.setenv("DIST_TRAINER_CACHE", str(tmp_path / "cache"))
    saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=8)
    assert run.start(*refusals, saved, kill(at_step=8)).was_killed
    ended = run.start(*refusals)
    assert ended.code == 0, ended.said
    assert "could not be" not in ended.said
    if said is not None:
        assert said in ended.said
    run.equals(undisturbed)
    assert os.readlink(run.checkpoints / "best") == "step-00000012"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_without_links_the_checkpoints_are_there_and_the_best_is_found_by_the_status(run, number):
    saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=8)
    refusal = refuse("symlink", number)
    assert run.start(refusal, saved, kill(at_step=8)).was_killed
    assert run.saved_steps() == [5, 6], "the best one is kept"
    assert run.status()["best_step"] == 5
    assert list(model_folders(run.folder))[1] == run.checkpoints / "step-00000005"
    ended = run.start(refusal)
    assert ended.code == 0, ended.said
    assert ended.said.count("symbolic links are refused by this file system") == 1
    assert "without `latest` and `best`" in ended.said
    assert sorted(os.listdir(run.checkpoints)) == ["step-00000010", "step-00000012"]
    assert run.status()["best_step"] == 12


def without_links(run_folder: Path) -> None:
    """As `cp -rL` and tools that follow links copy it: `latest` and `best` are whole checkpoints."""
    copy = run_folder.with_name("copy")
    shutil.copytree(run_folder, copy, symlinks=False)
    shutil.rmtree(run_folder)
    copy.rename(run_folder)


def test_a_copy_without_links_is_resumed_and_keeps_no_checkpoint_twice(run, undisturbed):
    saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=8)
    assert run.start(saved, kill(at_step=8)).was_killed
    without_links(run.folder)
    assert not (run.checkpoints / "best").is_symlink()
    run.finish()
    run.equals(undisturbed)
    without_links(run.folder)
    assert run.start().code == 0
    assert sorted(os.listdir(run.checkpoints)) == ["best", "latest", "step-00000010", "step-00000012"]
    assert os.readlink(run.checkpoints / "latest") == "step-00000012"


@pytest.fixture
def saver(tmp_path):
    """Steps 3 and 6 are saved, the links are whole copies of the newest one."""
    saver = Saver(tmp_path / "run")
    saver.save(3, 6)
    without_links(saver.folder)
    return saver


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_a_complete_copy_replaces_a_checkpoint_that_is(saver, what):
    newest = saver.checkpoints / "step-00000006"
    if what == "damaged":
        flip_bit(newest / "model.safetensors")
    else:
        shutil.rmtree(newest)
    assert saver.start() == 6
    kept = {"best", "latest", "step-00000003", "step-00000006"} | ({"corrupt-step-00000006"} if what == "damaged" else set())
    assert set(os.listdir(saver.checkpoints)) == kept
    assert saver.start_again() == 6


@pytest.mark.parametrize("name", ["latest", "best"])
def test_what_is_no_copy_of_a_checkpoint_is_kept(saver, name):
    before = contents(saver.checkpoints / name)
    flip_bit(saver.checkpoints / name / "manifest.json")
    found = resume_point(saver.checkpoints, keep_last=2)
    assert found is not None
    assert os.readlink(saver.checkpoints / name) == "step-00000006"
    assert contents(saver.checkpoints / f"corrupt-{name}").keys() == before.keys()


def test_a_copy_of_a_step_that_was_saved_again_is_not_kept(saver):
    latest = saver.checkpoints / "latest"
    state = json.loads((latest / "trainer_state.json").read_text())
    state["progress"]["validation_loss"] = None
    (latest / "trainer_state.json").write_text(json.dumps(state))
    metadata = {"format_version": 1, "step": 6, "world_size": None}
    (latest / "manifest.json").unlink()
    (latest / "manifest.json").write_text(describe_files(latest, metadata))
    assert saver.start() == 6
    assert sorted(os.listdir(saver.checkpoints)) == ["best", "latest", "step-00000003", "step-00000006"]
    assert latest.is_symlink()
