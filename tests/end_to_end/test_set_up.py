"""launch/setup.sh: which Python and which build of torch it takes, and when `make` calls it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.test_launch_files import REPOSITORY, write_program


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_second_set_up_has_nothing_to_do() -> None:
    if not (REPOSITORY / ".venv/.set-up").exists():
        pytest.skip("these tests were not started by `make test`")
    subprocess.run(["make", "--question", "setup"], cwd=REPOSITORY, check=True)


def test_set_up_rejects_an_old_python_in_one_sentence(tmp_path: Path) -> None:
    """On a copy without .venv/, so that nothing is made."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/setup.sh", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    write_program(tmp_path / "old", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit\nexit 1\n')
    environment = {**os.environ, "PYTHON": str(tmp_path / "old")}
    done = subprocess.run([tmp_path / "launch/setup.sh"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is Python 3.9.2, but Python 3.11 or newer is needed: make setup PYTHON=" in done.stderr


# A Python whose pip installs the build of torch that the index's name says, and that has no other packages.
FAKE_VENV = """#!/bin/bash
has=$(dirname "$0")/torch
case "$*" in
  *"import uv"* | *"config get"*) exit 1 ;;
  *"pip "*" install "*" --index-url "*) echo "PIP $*"; echo "${GIVES:-$TORCH}" >"$has" ;;
  *"pip "*" install "*torch==*+cpu) echo "PIP $*"; echo "${GIVES:-cpu}" >"$has" ;;
  *"pip "*" install "*torch*) echo "PIP $*"; echo "${GIVES:-cu130}" >"$has" ;;
  *version.py*) cat "$has" 2>/dev/null ;;
  *torch.__version__* | *metadata*) [[ -e $has ]] && echo "2.13.0+$(cat "$has")" ;;
  *is_available*) exit 1 ;;
  --version) echo Python 3.11.7 ;;
esac
"""


@pytest.mark.parametrize(
    ("has", "asked", "said"),
    [
        ("", "cu126", r"PIP -m pip .*--index-url https://index.example/whl/cu126 --force-reinstall torch>=2\.11"),
        ("cpu", "rocm7.2", r"PIP -m pip .*--index-url https://index.example/whl/rocm7.2 "),
        ("cu130", "cu126", r"PIP -m pip .*/cu126 "),
        ("cpu", "gpu", r"PIP -m pip .*--upgrade torch>=2\.11"),
        ("cu126", "cu126", r"keeping torch 2.13.0\+cu126"),
        ("cu126", "gpu", r"keeping torch 2.13.0\+cu126"),
        ("cu126", "auto", r"keeping torch 2.13.0\+cu126"),
        ("cu126", "cpu", r"PIP -m pip .*--no-deps torch==2\.13\.0\+cpu"),
        ("cpu", "cpu", r"keeping torch 2.13.0\+cpu"),
    ],
)
def test_set_up_takes_the_build_of_torch_that_was_asked_for(tmp_path: Path, has: str, asked: str, said: str) -> None:
    done = set_up(tmp_path, has, TORCH=asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(said, done.stdout), done.stdout
    assert ("keeping" in done.stdout) == said.startswith("keeping")
    assert (tmp_path / ".venv/.torch").read_text() == f"{asked}\n"


def test_set_up_rejects_a_build_that_it_does_not_know_or_did_not_get(tmp_path: Path) -> None:
    unknown = set_up(tmp_path, "", TORCH="cuda")
    assert (unknown.returncode, "TORCH is 'cuda'; it can be auto, gpu, cpu, or a build" in unknown.stderr) == (1, True)
    other = set_up(tmp_path, "", TORCH="cu126", GIVES="cpu")
    assert (other.returncode, "TORCH=cu126 was asked for, but torch 2.13.0+cpu is built for cpu" in other.stderr) == (1, True)
    assert not (tmp_path / ".venv/.torch").exists()


def test_set_up_says_how_to_get_a_build_that_can_use_the_gpu(tmp_path: Path) -> None:
    """A torch that is there is kept."""
    (tmp_path / "nvidia").mkdir()
    write_program(tmp_path / "nvidia/nvidia-smi", '#!/bin/bash\necho "GPU 0: A   CUDA Version: 12.4"\n')
    done = set_up(tmp_path, "cpu", PATH=f"{tmp_path}/nvidia:/usr/bin:/bin")
    assert "keeping torch 2.13.0+cpu" in done.stdout
    assert "torch 2.13.0+cpu cannot use this machine's GPU" in done.stdout
    assert "make setup TORCH=cu126 (the driver supports CUDA 12.4 and older)" in done.stdout


def set_up(folder: Path, torch: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """launch/setup.sh in a copy whose .venv/ has this build of torch."""
    for name in ("launch/setup.sh", "launch/checks.sh", "pyproject.toml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / ".venv/bin").mkdir(parents=True, exist_ok=True)
    write_program(folder / ".venv/bin/python", FAKE_VENV)
    (folder / ".venv/pyvenv.cfg").touch()
    if torch:
        (folder / ".venv/bin/torch").write_text(torch)
    clean = {"PATH": "/usr/bin:/bin", "TORCH_INDEX": "https://index.example/whl", **variables}
    return subprocess.run([folder / "launch/setup.sh"], env=clean, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_sets_up_once_more_for_another_build_of_torch(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "launch/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    write_program(tmp_path / ".venv/bin/python", "#!/bin/bash\n")
    (tmp_path / ".venv/.set-up").write_text(f"{tmp_path}\n")
    (tmp_path / ".venv/.torch").write_text("cu126\n")

    def would_run(*words: str) -> bool:
        done = subprocess.run(["make", "--dry-run", "setup", *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return "launch/setup.sh" in done.stdout

    assert [would_run(), would_run("TORCH=cu126"), would_run("TORCH=cu130")] == [False, False, True]
