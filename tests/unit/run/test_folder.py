"""A refused run takes only a folder with it that was never anyone's."""

import pytest

from dist_trainer.run import folder
from dist_trainer.run.folder import RunFolder


def test_a_new_folder_in_which_nothing_happened_goes(tmp_path):
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
