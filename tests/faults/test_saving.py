"""A save, and the rotation after it, may end at any of its file operations."""

import os

import pytest

from tests.faults.faults import die
from tests.faults.file_operations import Operations
from tests.faults.saving import Saver, watched


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6 are saved; the save of step 9 is to move both pointers and to delete step 3."""
    saver = Saver(tmp_path_factory.mktemp("saved") / "run")
    saver.save(3, 6)
    assert sorted(os.listdir(saver.checkpoints)) == ["best", "latest", "step-00000003", "step-00000006"]
    return saver


def kinds_of(act, note):
    """The file operations that `act` is made of, by name and in order."""
    note.write_text("")

    def write_down(_number, kind):
        with note.open("a") as file:
            file.write(f"{kind}\n")

    ended = watched(Operations(write_down), act)
    assert ended.code == 0, ended.said
    return note.read_text().split()


def dying_at(operation):
    return Operations(lambda number, _: die() if number == operation else None)


def test_dying_at_each_file_operation_of_a_save_and_of_the_rotation_loses_nothing_and_leaves_no_litter(saved, tmp_path):
    note = tmp_path / "kinds.txt"
    rehearsal = saved.at(tmp_path / "rehearsal")
    kinds = kinds_of(lambda: rehearsal.save(9), note)
    assert {"open", "write", "fsync", "mkdir", "rename", "replace", "symlink", "unlink", "rmdir", "serialize_file"} <= set(
        kinds
    )
    visible = kinds.index("rename")
    for operation in range(len(kinds)):
        saver = saved.at(tmp_path / f"died-{operation}")
        assert watched(dying_at(operation), lambda saver=saver: saver.save(9)).was_killed
        # The save before is the least that is left, and once the rename is done it is the new one.
        step = 9 if operation > visible else 6
        assert saver.start() == step, f"died at operation {operation}, {kinds[operation]}"
        assert saver.litter() == []
        kept = ["best", "latest", *(f"step-{kept:08d}" for kept in (step - 3, step))]
        assert sorted(os.listdir(saver.checkpoints)) == kept, f"died at operation {operation}, {kinds[operation]}"
        assert saver.start_again() == step
        for pointer in ("latest", "best"):
            assert os.readlink(saver.checkpoints / pointer) == f"step-{step:08d}"
        if operation % 5 == 0:
            saver.save(9, 12)
            assert sorted(os.listdir(saver.checkpoints)) == ["best", "latest", "step-00000009", "step-00000012"]


def test_dying_at_each_file_operation_of_the_start_after_a_kill_loses_nothing_either(saved, tmp_path):
    note = tmp_path / "kinds.txt"
    killed = saved.at(tmp_path / "killed")
    # One kill within the rotation and one within the next save: there is something of each kind to clean up.
    for step, kind in ((9, "rmdir"), (12, "fsync")):
        rehearsal = killed.at(tmp_path / f"rehearsal-{step}")
        kinds = kinds_of(lambda: rehearsal.save(step), note)  # noqa: B023  called at once
        operation = len(kinds) - 1 - kinds[::-1].index(kind)
        assert watched(dying_at(operation), lambda step=step: killed.save(step)).was_killed
    assert killed.litter()
    total = len(kinds_of(killed.at(tmp_path / "rehearsal").start, note))
    assert total > 10
    for operation in range(total):
        saver = killed.at(tmp_path / f"died-{operation}")
        assert watched(dying_at(operation), saver.start).was_killed
        assert saver.start() >= 9
        assert saver.litter() == []


@pytest.mark.parametrize("how", [Saver.start, Saver.resume], ids=["the command", "Trainer.resume"])
def test_dying_while_a_checkpoint_is_replaced_by_one_of_the_same_step_never_loses_both(saved, tmp_path, how):
    """As happens where a validation is made up for."""
    kinds = kinds_of(saved.at(tmp_path / "rehearsal").save_again, tmp_path / "kinds.txt")
    assert kinds.count("rename") == 2
    first = kinds.index("rename")
    # Before that, nothing is visible of it.
    for operation in range(first - 1, len(kinds)):
        saver = saved.at(tmp_path / f"died-{operation}")
        assert watched(dying_at(operation), saver.save_again).was_killed
        assert how(saver) == 6, f"died at operation {operation}, {kinds[operation]}"
        assert saver.litter() == []
        assert saver.start() == 6


def test_the_start_of_a_finished_run_rotates_too(run):
    run.finish()
    assert run.saved_steps() == [10, 12]
    assert run.start(config=run.but(checkpoint__keep_last=1)).code == 0
    assert run.saved_steps() == [12]
