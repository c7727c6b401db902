"""Power loss: what is visible is complete, whatever was not synced yet."""

import json
import os
import shutil

import pytest

from dist_trainer.checkpoint import manager
from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.errors import CheckpointError
from dist_trainer.storage import folders
from dist_trainer.storage.manifest import verify
from tests.faults.power import Disk
from tests.faults.processes import Process
from tests.faults.saving import Saver


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6."""
    saver = Saver(tmp_path_factory.mktemp("saved") / "run")
    saver.save(3, 6)
    return saver


def cut_power_during_a_save(saver, step) -> tuple[int, list[str]]:
    """In this process: save `step`, and cut the power before every operation of it; how often, and what was wrong then."""
    cuts, complaints = 0, []
    after = Saver(saver.folder.with_name("after"), saver.model, saver.save_model)

    def examine(*, is_done):
        for checkpoint in step_folders(after.checkpoints):
            verify(checkpoint)
        begins_at = after.start()
        assert begins_at == step if is_done else begins_at in (6, step), f"goes on from step {begins_at}"
        assert after.litter() == []
        assert os.readlink(after.checkpoints / "best") == f"step-{begins_at:08d}"

    def cut_power(operation, *, is_done=False):
        nonlocal cuts
        for names in ("kept", "lost"):
            disk.after_power_cut(after.folder, names=names)
            try:
                examine(is_done=is_done)
            except (AssertionError, CheckpointError) as error:
                complaints.append(f"power cut before {operation}, names {names}: {error}")
            finally:
                shutil.rmtree(after.folder)
            cuts += 1

    disk = Disk(saver.folder, cut_power)
    saver.save(step)
    disk.stop()
    cut_power("the end", is_done=True)
    return cuts, complaints


def in_a_process(act, tmp_path):
    """What `act` gives in a forked process."""
    note = tmp_path / "note.json"

    def live():
        note.write_text(json.dumps(act()))
        return 0

    ended = Process(live).wait()
    assert ended.code == 0, ended.said
    return json.loads(note.read_text())


@pytest.mark.parametrize("step", [9, 6], ids=["of a new step", "of a step that is there already"])
def test_a_power_cut_before_any_operation_of_a_save_leaves_only_complete_checkpoints(saved, tmp_path, step):
    cuts, complaints = in_a_process(lambda: cut_power_during_a_save(saved.at(tmp_path / "run"), step), tmp_path)
    assert complaints == []
    assert cuts > 40


@pytest.mark.parametrize("forgotten", ["a file", "the manifest", "the folder", "the parent"])
def test_the_model_notices_what_is_not_synced(saved, tmp_path, forgotten):
    """Else it would prove nothing."""

    def is_forgotten(path):
        is_staging, in_staging = (name.startswith(".staging-step-") for name in (path.name, path.parent.name))
        return {
            "a file": in_staging and path.name == "optimizer.safetensors",
            "the manifest": in_staging and path.name == "manifest.json",
            "the folder": is_staging,
            "the parent": path.name == "checkpoints",
        }[forgotten]

    def act():
        sync = folders.sync
        folders.sync = lambda path: None if is_forgotten(path) else sync(path)
        return cut_power_during_a_save(saved.at(tmp_path / "run"), 9)

    _, complaints = in_a_process(act, tmp_path)
    assert complaints


def test_in_a_complete_run_metrics_are_synced_before_the_checkpoint_that_needs_them_is_visible(run):
    note = run.folder.parent / "note.txt"

    def watch_the_disk():
        publish = folders.publish
        run.folder.mkdir(parents=True)
        disk = Disk(run.folder)

        def publish_then_cut(folder, write, *, metadata):
            publish(folder, write, metadata=metadata)
            after = disk.after_power_cut(run.folder.with_name("after"), names="lost")
            verify(after / "checkpoints" / folder.name)
            lines = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]
            steps = [line["step"] for line in lines if line["kind"] == "train"]
            assert steps[: metadata["step"]] == list(range(1, metadata["step"] + 1))
            shutil.rmtree(after)
            with note.open("a") as file:
                file.write(f"{metadata['step']}\n")

        manager.publish = publish_then_cut

    ended = run.start(watch_the_disk)
    assert ended.code == 0, ended.said
    assert note.read_text().split() == ["3", "5", "6", "9", "10", "12"]
