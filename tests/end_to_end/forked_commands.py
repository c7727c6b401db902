"""Runs commands as `python -m` does, in processes forked from one that has imported what they import: a third of a second
each, and not five. How commands begin (imports, signals, torchrun) is for tests of the real ones in commands.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.end_to_end.commands import ROOT, SECONDS_OF_A_COMMAND, environment

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dist_trainer.run.lifecycle", "transformers", "torch._dynamo"])


def quick_command(*words: object, module: str = "dist_trainer.train", **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m module words`; stdout and stderr as text. Options: cwd, timeout (seconds), and variables."""
    timeout, cwd = options.pop("timeout", SECONDS_OF_A_COMMAND), options.pop("cwd", ROOT)
    arguments = [module, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder)
        process = _CONTEXT.Process(target=_live, args=(arguments, str(cwd), environment(**options), str(said)))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, (said / "1").read_bytes(), (said / "2").read_bytes())
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, (said / "1").read_text(), (said / "2").read_text())


def _live(arguments: list[str], cwd: str, variables: dict[str, str], said: str) -> None:
    gc.freeze()  # what is imported stays
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(f"{said}/{number}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
