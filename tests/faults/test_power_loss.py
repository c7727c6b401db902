"""Power loss: what is visible is whole, whatever the disk has not yet been told to keep."""

import json
import shutil

import pytest

from dist_trainer.checkpoint import manager, storage
from dist_trainer.checkpoint.manager import step_folders
from dist_trainer.errors import CheckpointError
from dist_trainer.manifest import verify
from tests.faults.damage import contents
from tests.faults.power_cut import Disk
from tests.faults.processes import Process
from tests.faults.saves import next_start, save


def cut_power_during_a_save(folder, step) -> tuple[int, list[str]]:
    """In this process: save `step`, and cut the power before every operation of it; how often, and what was wrong then."""
    cuts, complaints = 0, []
    for earlier in (1, 2):
        save(folder, earlier, keep_last=2)
    old = {path.name: contents(path) for path in step_folders(folder / "checkpoints")}

    def examine(found, *, is_done):
        for checkpoint in step_folders(found / "checkpoints"):
            verify(checkpoint)
        checkpoint, progress = next_start(found)
        assert progress.step == step if is_done else progress.step in (2, step), "the step"
        assert progress.step == step or contents(checkpoint) == old[checkpoint.name], "the content"
        assert progress.best_step == (3 if progress.step == 3 else 1), "the best"

    def cut_power(operation, *, is_done=False):
        nonlocal cuts
        for names in ("kept", "lost"):
            found = disk.after_power_cut(folder.with_name("after"), names=names)
            try:
                examine(found, is_done=is_done)
            except (AssertionError, CheckpointError) as error:
                complaints.append(f"power cut before {operation}, names {names}: {error}")
            finally:
                shutil.rmtree(found)
            cuts += 1

    disk = Disk(folder, cut_power)
    save(folder, step, keep_last=1)
    disk.stop()
    cut_power("the end", is_done=True)
    return cuts, complaints


def in_a_process(act, tmp_path):
    """What `act` gives in a forked process."""
    note = tmp_path / "note.json"

    def live():
        note.write_text(json.dumps(act()))
        return 0

    ended = Process(live, tmp_path / "said.txt").wait()
    assert ended.code == 0, ended.said
    return json.loads(note.read_text())


@pytest.mark.parametrize("step", [3, 2], ids=["of a new step", "of a step that is there already"])
def test_a_power_cut_before_any_operation_of_a_save_leaves_only_whole_checkpoints(tmp_path, step):
    cuts, complaints = in_a_process(lambda: cut_power_during_a_save(tmp_path / "run", step), tmp_path)
    assert complaints == []
    assert cuts > 40


@pytest.mark.parametrize("forgotten", ["a file", "the manifest", "the folder", "the parent"])
def test_the_model_notices_what_is_not_synced(tmp_path, forgotten):
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
        sync = storage.sync
        storage.sync = lambda path: None if is_forgotten(path) else sync(path)
        return cut_power_during_a_save(tmp_path / "run", 3)

    _, complaints = in_a_process(act, tmp_path)
    assert complaints


def test_in_a_whole_run_metrics_are_synced_before_the_checkpoint_that_needs_them_is_visible(run):
    note = run.folder.parent / "note.txt"

    def watch_the_disk():
        publish = storage.publish
        run.folder.mkdir(parents=True)
        disk = Disk(run.folder)

        def publish_then_cut(folder, write, *, facts):
            publish(folder, write, facts=facts)
            after = disk.after_power_cut(run.folder.with_name("after"), names="lost")
            verify(after / "checkpoints" / folder.name)
            lines = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]
            steps = [line["step"] for line in lines if line["kind"] == "train"]
            assert steps[: facts["step"]] == list(range(1, facts["step"] + 1))
            shutil.rmtree(after)
            with note.open("a") as file:
                file.write(f"{facts['step']}\n")

        manager.publish = publish_then_cut

    ended = run.start(watch_the_disk)
    assert ended.code == 0, ended.said
    assert note.read_text().split() == ["3", "5", "6", "9", "10", "12"]
