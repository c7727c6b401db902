"""What all tests share: few threads, no network, one cache of token stores for each of pytest's workers."""

from __future__ import annotations

import gc
import logging
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

# Before anything imports torch or a Hugging Face library; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Python's bytecode too is one cache for all processes: each would compile torch itself if it may not write next to it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode"))
os.environ["DIST_TRAINER_CACHE"] = tempfile.mkdtemp(prefix="dist_trainer-tests-")


@pytest.fixture(autouse=True)
def package_logs_as_if_not_configured():
    """Whatever test ran before in this process: messages go to pytest, once."""
    _forget_log_handlers()
    yield
    _forget_log_handlers()


@pytest.fixture(autouse=True)
def signals_are_handled_as_before():
    """A command that ends leaves them ignored, and what later tests start would inherit that."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture
def not_under_nohup():
    """Also where the tests themselves were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def many_open_files():
    """So many that all that are opened now get descriptors above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    while opened[-1] < 1100:
        opened.append(os.dup(opened[0]))
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _forget_log_handlers() -> None:
    logger = logging.getLogger("dist_trainer")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        if type(handler).__module__.startswith("dist_trainer"):
            handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: no garbage collection has to look at it, here or in a forked rank."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["DIST_TRAINER_CACHE"], ignore_errors=True)
