"""A refused run takes only a folder with it that was never anyone's."""

import pytest

from dist_trainer.run import folder
from dist_trainer.run.folder import RunFolder


def test_a_new_folder_in_which_nothing_happened_is_removed(tmp_path):
    RunFolder(tmp_path / "run").close(unused=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", None])
def test_a_folder_that_was_there_stays(tmp_path, name):
    (tmp_path / "run").mkdir()
    if name:
        (tmp_path / "run" / name).touch()
    RunFolder(tmp_path / "run").close(unused=True)
    assert (tmp_path / "run").is_dir()


def test_a_run_that_another_job_had_between_the_look_and_the_lock_stays(tmp_path, monkeypatch):
    lock = folder.RunLock

    def lock_after_another_job(path):
        (path / "metrics.jsonl").write_text("of another job\n")
        return lock(path)

    monkeypatch.setattr(folder, "RunLock", lock_after_another_job)
    RunFolder(tmp_path / "run").close(unused=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of another job\n"


@pytest.mark.parametrize("earlier", ["archived-1", "replaced-1"], ids=["of this version", "of an older version"])
def test_an_archived_run_is_archived_with_no_other(tmp_path, earlier):
    (tmp_path / earlier).mkdir()
    (tmp_path / "metrics.jsonl").write_text("of the run before\n")
    run = RunFolder(tmp_path)
    run.archive_run()
    run.close()
    archive = "archived-2" if earlier == "archived-1" else "archived-1"
    assert (tmp_path / archive / "metrics.jsonl").read_text() == "of the run before\n"
    assert (tmp_path / earlier).is_dir()
    assert not (tmp_path / archive / earlier).exists()
