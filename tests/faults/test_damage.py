"""Damaged files: noticed before training, named, and the run goes back one checkpoint; it never starts over by itself."""

import shutil

import pytest

from dist_trainer.checkpoint.folders import latest_valid, resume_point
from tests.faults.conftest import a_run
from tests.faults.damage import DAMAGES, contents, damaged, delete, empty, flip_bit, truncate
from tests.faults.faults import do, kill

BITS = 25
"""Flipped in each file, one at a time, at random places."""


@pytest.fixture(scope="module")
def interrupted(text, tmp_path_factory):
    """A run that was killed after step 11: steps 6, 9 and, as the best one, 10 are saved."""
    run = a_run(text, tmp_path_factory.mktemp("interrupted") / "runs", checkpoint__keep_last=3)
    saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=11)
    assert run.start(saved, kill(at_step=11)).was_killed
    assert run.saved_steps()[-2:] == [9, 10]
    return run


@pytest.fixture
def run(interrupted, text, tmp_path):
    """A copy of it, for damage."""
    run = a_run(text, tmp_path / "runs", checkpoint__keep_last=3)
    shutil.copytree(interrupted.folder, run.folder, symlinks=True)
    return run


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def passed_over(folder, caplog):
    """What is chosen, and what is said of what is not."""
    caplog.clear()
    return latest_valid(folder).name, caplog.text


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_any_damage_to_any_file_of_the_newest_checkpoint_is_noticed_and_the_file_named(run, caplog, damage):
    names = [path.name for path in files_of(run.newest())]
    assert {"manifest.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json"} <= set(names)
    for path in files_of(run.newest()):
        for seed in range(BITS if damage is flip_bit else 1):
            with damaged(path, lambda path, seed=seed: damage(path, seed=seed) if damage is flip_bit else damage(path)):
                chosen, said = passed_over(run.checkpoints, caplog)
            assert chosen == "step-00000009", f"{path}, seed {seed}"
            assert str(path) in said
    assert passed_over(run.checkpoints, caplog) == ("step-00000010", "")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip_bit),
        ("optimizer.safetensors", truncate),
        ("manifest.json", empty),
        ("trainer_state.json", delete),
    ],
)
def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before_and_says_so(run, undisturbed, name, damage):
    path = run.newest() / name
    damage(path)
    ended = run.finish()
    assert f"invalid checkpoint skipped: {path}" in ended.said
    assert run.resumed_at()[-1] == 9
    assert (run.checkpoints / "corrupt-step-00000010").is_dir()
    run.equals(undisturbed)


@pytest.mark.parametrize("damage", [flip_bit, empty, delete])
def test_with_no_valid_checkpoint_the_run_stops_changes_nothing_and_never_starts_over(run, damage):
    for checkpoint in run.checkpoints.glob("step-*"):
        damage(checkpoint / "model.safetensors")
    before = contents(run.checkpoints), (run.folder / "metrics.jsonl").read_bytes()
    for _ in range(2):
        ended = run.start()
        assert ended.code == 2
        assert "none of them is valid" in ended.said
        assert "--checkpoint.resume never" in ended.said
        assert (contents(run.checkpoints), (run.folder / "metrics.jsonl").read_bytes()) == before


@pytest.mark.parametrize("renamed", [None, "corrupt", "damaged"], ids=["gone", "renamed", "renamed by an older version"])
def test_a_run_whose_checkpoints_are_all_gone_does_not_start_either(run, renamed):
    for checkpoint in run.checkpoints.glob("step-*"):
        shutil.rmtree(checkpoint)
    if renamed is not None:
        for link in ("latest", "best"):
            (run.checkpoints / link).unlink()
        (run.checkpoints / f"{renamed}-step-00000010").mkdir()
    ended = run.start()
    assert ended.code == 2
    assert "none of them is valid" in ended.said


def test_with_resume_never_the_damaged_run_is_archived_and_nothing_deleted(run, undisturbed):
    for checkpoint in run.checkpoints.glob("step-*"):
        empty(checkpoint / "manifest.json")
    before = contents(run.checkpoints)
    assert run.start(config=run.but(checkpoint__resume="never")).code == 0
    run.equals(undisturbed)
    assert contents(run.folder / "archived-1" / "checkpoints") == before


def test_a_checkpoint_that_is_another_under_its_name_is_noticed(run, caplog):
    shutil.rmtree(run.newest())
    shutil.copytree(run.checkpoints / "step-00000009", run.checkpoints / "step-00000010")
    chosen, said = passed_over(run.checkpoints, caplog)
    assert chosen == "step-00000009"
    assert "step-00000010 holds step 9" in said


def test_damage_between_the_choice_and_the_reading_is_noticed(run, undisturbed):
    """A disk need not give the same bits twice: what was read is compared, not only what was chosen."""

    def damage_when_read():
        from dist_trainer.training import saving

        load_weights = saving.load_weights

        def load(model, folder):
            if folder.name == "step-00000010":
                flip_bit(folder / "model.safetensors")
            return load_weights(model, folder)

        saving.load_weights = load

    ended = run.start(damage_when_read)
    assert ended.code == 0, ended.said
    assert run.resumed_at()[-1] == 9
    run.equals(undisturbed)


# ------------------------------------------------------------------------------- what is only a hint, or a report


def lead(target):
    def act(path):
        path.unlink()
        path.symlink_to(target)

    return act


def become_a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "precious").write_text("not ours")


@pytest.mark.parametrize(
    "damage",
    [delete, lead("step-00000006"), lead("step-99999999"), lead("latest"), lead("../../elsewhere"), lead("/"), become_a_folder],
    ids=["deleted", "to another", "to nothing", "to itself", "to elsewhere", "to the root", "a folder"],
)
def test_pointers_are_hints_and_are_repaired(run, damage):
    for name in ("latest", "best"):
        damage(run.checkpoints / name)
    checkpoint, progress = resume_point(run.checkpoints, keep_last=3)
    assert (checkpoint.name, progress.step, progress.best_step) == ("step-00000010", 10, 10)
    for name in ("latest", "best"):
        assert str((run.checkpoints / name).readlink()) == "step-00000010"


def fill_with_noise(path):
    path.write_bytes(bytes(range(256)) * 3)


@pytest.mark.parametrize("damage", [fill_with_noise, empty])
def test_files_that_are_not_read_again_may_hold_anything(run, undisturbed, damage):
    for name in ("status.json", "config.yaml", "report.html", "logs/events.jsonl"):
        damage(run.folder / name)
    assert run.start().code == 0
    assert run.status()["state"] == "finished"
    run.equals(undisturbed)


def double(path):
    path.write_bytes(path.read_bytes() * 2)


def add_half_a_line(path):
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "step": 1')


def add_noise(path):
    path.write_bytes(path.read_bytes() + b'\xff\0\n[1]\n"x"\n{"kind": "train", "step": 1e99}\n' + b"[" * 5000 + b"\n{}")


@pytest.mark.parametrize("damage", [double, add_half_a_line, add_noise])
def test_each_step_is_once_in_the_metrics_whatever_was_added_to_them(run, undisturbed, damage):
    damage(run.folder / "metrics.jsonl")
    run.finish()
    run.equals(undisturbed)


@pytest.mark.parametrize("damage", [flip_bit, empty, delete])
def test_damaged_metrics_do_not_keep_a_run_from_resuming(run, undisturbed, damage):
    damage(run.folder / "metrics.jsonl")
    run.finish()
    assert run.lines()[-1]["loss"] == undisturbed.lines()[-1]["loss"]
    assert len({line["step"] for line in run.lines()}) == len(run.lines())
