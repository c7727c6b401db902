"""Ranks are forked from pytest; what is slow to import is imported once, here, before."""

import pytest
import torch._dynamo  # noqa: F401  DistributedDataParallel imports it: three seconds in each worker otherwise
import transformers  # noqa: F401

from tests.distributed.small_runs import write_stories


@pytest.fixture
def stories(tmp_path_factory):
    """A JSONL file of 40 small documents of real text."""
    path = tmp_path_factory.getbasetemp() / "stories.jsonl"
    return path if path.exists() else write_stories(path)
