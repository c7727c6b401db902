"""Memory runs out in a real process, by a real allocation that the system refuses: it ends in sizes and hints."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

import pytest
import torch

from dist_trainer.run import build, lifecycle
from dist_trainer.run.cli import run_cli
from dist_trainer.training.trainer import Trainer
from tests.distributed.ranks import exit_codes
from tests.distributed.small_runs import command
from tests.faults.faults import before_each_call
from tests.pace import allowed

HINTS = ["--batch.micro_batch_size (now 4)", "--precision.dtype bf16 (now fp32)", "--data.sequence_length (now 32)"]


def limit_memory(*, at_step: int, spare_bytes: int = 256 << 20):
    """From step `at_step` on this process may take but a little more than it has, and the loss needs far more than that."""

    def lay() -> None:
        train_step = Trainer.train_step

        def hungry_step(trainer, *arguments):
            if trainer.progress.step == at_step - 1:
                taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + spare_bytes,) * 2)
                loss_function = trainer.loss_function
                trainer.loss_function = lambda model, batch: loss_function(model, batch) + 0 * torch.ones(1 << 28).sum()
            return train_step(trainer, *arguments)

        Trainer.train_step = hungry_step

    return lay


def test_running_out_of_memory_ends_in_sizes_and_hints_and_the_run_resumes(run, undisturbed):
    ended = run.start(limit_memory(at_step=5))
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    summary = re.search(
        r"dist_trainer: out of memory in step 5, training: rank 0 requested 1.00 GiB more on this machine, which has "
        r"\S+ \wiB \(peak \S+ \wiB\)\n",
        ended.said,
    )
    assert summary, ended.said
    size = r"\S+ \wiB"
    state = rf"weights {size}, gradients {size}, optimizer {size}; the rest grows with the micro-batch, such as its logits"
    assert re.search(rf"{state} in float32: 2.00 MiB \(4 x 32 tokens, vocabulary of 4096\)", ended.said)
    listed = ended.said.split("most likely to help, in this order:\n")[1].splitlines()
    assert all(hint in line for hint, line in zip(HINTS, listed, strict=True)), ended.said
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == summary[0].removeprefix("dist_trainer: ").strip()
    run.finish()
    run.equals(undisturbed)


def test_each_of_two_ranks_prints_its_sizes_in_a_line_and_the_first_one_the_rest(run, capfd):
    lay = limit_memory(at_step=5)
    assert command(run.but(batch__micro_batch_size=4), 2, before=lambda _: lay()) == [1, 1]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert len(re.findall(r"^dist_trainer: out of memory in step 5, training: rank 0 requested", said, re.MULTILINE)) == 1
    assert len(re.findall(r"\[rank 1\] error: out of memory in step 5, training: rank 1 requested", said)) == 1
    assert said.count("most likely to help") == 1
    assert run.status()["reason"].startswith("out of memory in step 5")


def test_if_only_one_rank_runs_out_its_line_is_printed_and_its_log_has_the_rest(run, capfd):
    lay = limit_memory(at_step=5)
    config = run.but(batch__micro_batch_size=4)
    assert command(config, 2, before=lambda trainer: lay() if trainer.world.rank == 1 else None) == [1, 1]
    said = capfd.readouterr().err
    assert len(re.findall(r"\[rank 1\] error: out of memory in step 5, training: rank 1 requested", said)) == 1
    assert "most likely to help" in (run.folder / "logs" / "rank-1.log").read_text()
    assert run.status()["state"] == "failed"
    assert "rank 1" in run.status()["reason"]


def test_before_there_is_a_model_it_is_an_error_that_leaves_no_files(run):
    ended = run.start(before_each_call(lambda: torch.empty(1 << 50), build, "build_model"))
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    assert "dist_trainer: out of memory before the first step: rank 0 requested 4096 TiB more on this machine" in ended.said
    assert HINTS[0] in ended.said
    assert not run.folder.exists()


@pytest.mark.slow
def test_before_there_is_a_model_two_ranks_end_at_once(run, capfd):
    lay = before_each_call(lambda: torch.empty(1 << 50), build, "build_optimizer")

    def one_rank() -> int:
        if os.environ["RANK"] == "1":
            lay()
        return lifecycle.run(run.config)

    began = time.monotonic()
    assert exit_codes(2, lambda: run_cli(one_rank)) == [1, 2]
    assert time.monotonic() - began < allowed(40)
    assert "[rank 1] error: out of memory before the first step: rank 1 requested" in capfd.readouterr().err
