"""Completion of keys and values at a TAB."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys

import pytest

from dist_trainer.config.help import completion_parser
from dist_trainer.config.keys import PATH_KEYS, key_types
from dist_trainer.errors import ConfigError
from dist_trainer.run.configure import load_config


def test_every_key_can_be_completed_with_the_values_it_may_have():
    actions = {action.dest: action for action in completion_parser()._actions}
    assert key_types().keys() <= actions.keys()
    assert set(PATH_KEYS) <= key_types().keys()
    assert actions["precision.dtype"].choices == ["auto", "fp32", "bf16", "fp16"]
    assert actions["optim.name"].choices == ["auto", "adamw", "muon"]
    assert actions["data.packing"].choices == ["true", "false"]
    assert actions["preset"].choices[0] == "1m"
    assert actions["optim.learning_rate"].choices is None


def test_without_shtab_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(ConfigError, match=r"needs the package shtab, which is not installed; .*python -m pip install"):
        load_config(["--print_completion", "bash"])


@pytest.fixture
def script(tmp_path, capsys):
    """The script for bash, in a file."""
    pytest.importorskip("shtab", reason="the optional package shtab writes the script")
    with pytest.raises(SystemExit):
        load_config(["--print_completion", "bash"])
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("dist-train --optim.", b"--optim.max_grad_norm"),
        ("dist-train --seed 3 --precision.dtype ", b"bf16"),
        ("dist-train --preset ", b"124m"),
    ],
)
def test_a_tab_in_bash_shows_what_can_be_typed(script, typed, shown):
    reading, writing = pty.openpty()
    environment = {**os.environ, "PS1": "ready> ", "TERM": "dumb"}
    process = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=writing, stdout=writing, stderr=writing, env=environment, text=False
    )
    try:
        os.close(writing)
        seen = wait_for(reading, b"ready> ")
        os.write(reading, f"source {script}\n".encode())
        wait_for(reading, b"ready> ")
        os.write(reading, f"{typed}\t\t".encode())
        seen = wait_for(reading, shown)
        assert shown in seen
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def wait_for(terminal: int, words: bytes) -> bytes:
    """What the terminal shows up to `words`."""
    seen = b""
    while words not in seen:
        assert select.select([terminal], [], [], 20)[0], seen
        seen += os.read(terminal, 65536)
    return seen
