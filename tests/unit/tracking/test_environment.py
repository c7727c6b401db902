"""Which code a run ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dist_trainer.tracking.environment import describe_commit, describe_own_commit


def repository(path: Path, text: str) -> str:
    """A repository with one committed file, code.py; its commit."""
    path.mkdir()
    (path / "code.py").write_text(text)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "code.py"], ["commit", "-qm", text]):
        subprocess.run([*git, *words], cwd=path, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=path, check=True, capture_output=True, text=True).stdout.strip()


def test_the_packages_commit_is_not_that_of_the_working_folder(tmp_path, monkeypatch):
    package, experiment = repository(tmp_path / "package", "one"), repository(tmp_path / "experiment", "two")
    monkeypatch.chdir(tmp_path / "experiment")
    assert describe_commit() == {"git_commit": experiment, "git_dirty": False}
    (tmp_path / "package" / "code.py").write_text("changed")
    assert describe_own_commit(tmp_path / "package" / "code.py") == {"git_commit": package, "git_dirty": True}


def test_a_package_installed_below_anothers_repository_has_no_commit(tmp_path):
    repository(tmp_path / "experiment", "two")
    installed = tmp_path / "experiment" / "site-packages"
    installed.mkdir()
    (installed / "code.py").write_text("installed")
    assert describe_own_commit(installed / "code.py") == {"git_commit": None, "git_dirty": None}
