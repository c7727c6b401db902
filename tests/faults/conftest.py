"""What faults are injected into: a small run that takes half a second, in a process forked from pytest."""

import os
import subprocess

import pytest
import torch._dynamo  # noqa: F401  seconds in each forked process otherwise
import transformers  # noqa: F401

from dist_trainer.data.tokenizers import load_tokenizer
from tests.distributed import small_runs
from tests.distributed.conftest import stories
from tests.distributed.small_runs import small_config, write_stories
from tests.faults.faults import Run

__all__ = ["stories"]

load_tokenizer("austen")  # what transformers imports for it, a second in each forked process otherwise


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A JSONL file of 40 small documents of real text."""
    return write_stories(tmp_path_factory.mktemp("text") / "stories.jsonl")


@pytest.fixture(scope="session")
def undisturbed(text, tmp_path_factory):
    """The run that nothing happens to."""
    run = a_run(text, tmp_path_factory.mktemp("undisturbed"))
    run.finish()
    return run


@pytest.fixture(scope="session")
def undisturbed_by_two(text, tmp_path_factory):
    """The config of a run by two ranks that nothing happens to."""
    config = small_config(text, tmp_path_factory.mktemp("undisturbed"))
    assert small_runs.run(config, 2) == [0, 0]
    return config


@pytest.fixture
def run(text, tmp_path):
    """The same run, to which things happen."""
    return a_run(text, tmp_path / "runs")


def a_run(text, output_dir, **changes):
    """12 steps, saved at 3, 6, 9, 12, validated at 5, 10, 12; two checkpoints and the best one are kept."""
    often = {"checkpoint__every_steps": 3, "checkpoint__keep_last": 2, "batch__micro_batch_size": 4}
    return Run(small_config(text, output_dir, **{**often, **changes}))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
