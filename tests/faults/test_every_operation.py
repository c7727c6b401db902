"""Dying at each single file operation of a save, and of the rotation after it."""

import shutil

import pytest

from tests.faults.damage import contents
from tests.faults.faults import die
from tests.faults.file_operations import Operations
from tests.faults.processes import Process
from tests.faults.saves import copied, next_start, save

STEPS = {"of a step that is there already": 2}  # of a new step: test_saving.py


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run with checkpoints of step 1, the best, and of step 2."""
    folder = tmp_path_factory.mktemp("before") / "run"
    for step in (1, 2):
        save(folder, step, keep_last=2)
    assert names(folder / "checkpoints") == ["best", "latest", "step-00000001", "step-00000002"]
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_dying_at_any_operation_of_a_save_loses_no_older_checkpoint_and_leaves_no_litter(before, tmp_path, step):
    seen = []
    undisturbed = copied(before, tmp_path / "undisturbed")
    save(undisturbed, step, in_thread=Operations(lambda number, name: seen.append(name)))
    expected = contents(undisturbed / "checkpoints")
    assert {"open", "write", "serialize_file", "save", "fsync", "rename", "unlink", "rmdir"} <= set(seen)
    if step == 3:
        assert {"symlink", "replace"} <= set(seen)
        assert names(undisturbed / "checkpoints") == ["best", "latest", "step-00000003"]

    for operation in range(len(seen)):
        run = copied(before, tmp_path / "run")
        watch = Operations(lambda number, _, last=operation: die() if number == last else None)

        def live(run=run, watch=watch):
            save(run, step, in_thread=watch)
            return 0

        assert Process(live).wait().was_killed, f"operation {operation} did not come"

        checkpoint, progress = next_start(run)
        where = f"before operation {operation}, {seen[operation]}"
        assert progress.step in (2, step), where
        assert progress.best_step == (3 if progress.step == 3 else 1), where
        assert not [name for name in names(run / "checkpoints") if name.startswith((".", "damaged"))], where
        whole = contents(checkpoint)
        was_new = {name.partition("/")[2]: value for name, value in expected.items() if name.startswith(f"step-{step:08d}/")}
        was_old = contents(before / "checkpoints" / checkpoint.name) if progress.step == 2 else None
        assert whole in (was_new, was_old), where

        save(run, step)
        assert contents(run / "checkpoints") == expected, where
        shutil.rmtree(run)
