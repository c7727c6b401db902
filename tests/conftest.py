"""What all tests share: few threads, no network, one cache of token stores for each of pytest's workers."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

# Before anything imports torch or a Hugging Face library; subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DIST_TRAINER_CACHE"] = tempfile.mkdtemp(prefix="dist_trainer-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["DIST_TRAINER_CACHE"], ignore_errors=True)
