"""Ranks are forked from pytest; what is slow to import is imported once, here, before."""

import encodings.idna  # noqa: F401  for the name of a host
import json

import numpy.ctypeslib
import numpy.ma  # noqa: F401  by numpy.unique
import pytest
import torch._dynamo  # noqa: F401  optimizers and DistributedDataParallel import it: seconds in each worker otherwise
import transformers  # noqa: F401

from dist_trainer.data.tokenizers import load_tokenizer
from tests.distributed.small_runs import run, small_config, write_conversations, write_stories

load_tokenizer("austen")  # imports more of transformers


@pytest.fixture
def stories(tmp_path_factory):
    """A JSONL file of 40 small documents of real text."""
    path = tmp_path_factory.getbasetemp() / "stories.jsonl"
    return path if path.exists() else write_stories(path)


@pytest.fixture
def conversations(tmp_path_factory):
    """A JSONL file of 60 conversations."""
    path = tmp_path_factory.getbasetemp() / "conversations.jsonl"
    return path if path.exists() else write_conversations(path)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A function: the finished run on `stories` by so many ranks with these changes, made once. Leave its folder as it is."""
    runs = {}

    def of(world_size, changes):
        key = json.dumps([world_size, changes])
        if key not in runs:
            text = write_stories(tmp_path_factory.mktemp("text") / "stories.jsonl")
            runs[key] = small_config(text, tmp_path_factory.mktemp("undisturbed"), **changes)
            assert run(runs[key], world_size) == [0] * world_size
        return runs[key]

    return of
