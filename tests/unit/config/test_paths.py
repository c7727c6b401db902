"""Where caches are: also for a user whom the system does not know."""

import getpass
import os
from pathlib import Path

import pytest

from dist_trainer.config.paths import default_cache_dir


@pytest.fixture
def unknown_user(monkeypatch, tmp_path):
    """As in a container that runs under a number of its own."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "")  # so that what is set here is set back
    monkeypatch.setenv("LOGNAME", "")
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "DIST_TRAINER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_a_user_whom_nobody_knows_has_a_home_of_its_own_and_a_name(unknown_user, tmp_path):
    assert default_cache_dir() == tmp_path / f"home-{os.getuid()}" / ".cache" / "dist_trainer"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert getpass.getuser() == str(os.getuid())
    assert os.path.expanduser("~") != "~", "libraries would make a folder of that name"


def test_a_folder_that_somebody_else_made_there_is_not_used(unknown_user, tmp_path, monkeypatch):
    (tmp_path / "home-12345").mkdir()
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert default_cache_dir().parent.parent != tmp_path / "home-12345"


def test_variables_come_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DIST_TRAINER_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "dist_trainer"
    monkeypatch.setenv("DIST_TRAINER_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"
