"""Memory runs out in a real process, by a real allocation that the system refuses: it ends in numbers and remedies."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

import pytest
import torch

from dist_trainer.run import build
from dist_trainer.run.cli import run_cli
from dist_trainer.training.precision import emulates_bf16
from dist_trainer.training.trainer import Trainer
from tests.distributed.ranks import exit_codes
from tests.distributed.small_runs import command
from tests.faults.faults import before_each_call
from tests.pace import allowed

FORMATS = [] if emulates_bf16(torch.device("cpu")) else ["--precision.dtype bf16 (it is fp32)"]
SETTINGS = ["--batch.micro_batch_size 2 (it is 4)", *FORMATS, "--data.sequence_length"]


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


def test_running_out_of_memory_ends_in_numbers_and_three_settings_and_the_run_goes_on_with_one(run, undisturbed):
    ended = run.start(limit_memory(at_step=5))
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    summary = re.search(
        r"dist_trainer: out of memory in step 5, training: rank 0 wanted 1.00 GiB more of the machine's \S+ \wiB "
        r"\(\S+ \wiB in use, \S+ \wiB at most so far\)\n",
        ended.said,
    )
    assert summary, ended.said
    size = r"\S+ \wiB"
    state = rf"weights {size}, gradients {size}, optimizer {size}; the rest goes with the micro-batch: "
    assert re.search(rf"{state}its logits in float32, 4 x 32 tokens x 4096 words, would be 2.00 MiB", ended.said)
    listed = ended.said.split("most likely to help, the first first:\n")[1].splitlines()
    assert len(listed) == 3
    assert all(setting in line for setting, line in zip(SETTINGS, listed, strict=True)), ended.said
    status = run.status()
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == summary[0].removeprefix("dist_trainer: ").strip()
    run.finish()
    run.equals(undisturbed)


def test_of_two_ranks_each_tells_its_numbers_in_a_line_and_the_first_the_rest(run, capfd):
    lay = limit_memory(at_step=5)
    assert command(run.but(batch__micro_batch_size=4), 2, before=lambda _: lay()) == [1, 1]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert len(re.findall(r"^dist_trainer: out of memory in step 5, training: rank 0 wanted", said, re.MULTILINE)) == 1
    assert len(re.findall(r"\[rank 1\] error: out of memory in step 5, training: rank 1 wanted", said)) == 1
    assert said.count("most likely to help") == 1
    assert run.status()["reason"].startswith("out of memory in step 5")


def test_where_one_rank_alone_runs_out_its_line_is_printed_and_its_log_has_the_rest(run, capfd):
    lay = limit_memory(at_step=5)
    config = run.but(batch__micro_batch_size=4)
    assert command(config, 2, before=lambda trainer: lay() if trainer.world.rank == 1 else None) == [1, 1]
    said = capfd.readouterr().err
    assert len(re.findall(r"\[rank 1\] error: out of memory in step 5, training: rank 1 wanted", said)) == 1
    assert "most likely to help" in (run.folder / "logs" / "rank-1.log").read_text()
    assert run.status()["state"] == "failed"
    assert "rank 1" in run.status()["reason"]


def test_before_there_is_a_model_it_is_a_refusal_that_leaves_nothing(run):
    ended = run.start(before_each_call(lambda: torch.empty(1 << 50), build, "build_model"))
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    assert "dist_trainer: out of memory before the first step: rank 0 wanted 4096 TiB more of the machine's" in ended.said
    assert "--batch.micro_batch_size 2 (it is 4)" in ended.said
    assert not run.folder.exists()


@pytest.mark.slow
def test_before_there_is_a_model_two_ranks_end_at_once(run, capfd):
    lay = before_each_call(lambda: torch.empty(1 << 50), build, "build_optimizer")

    def one_rank() -> int:
        if os.environ["RANK"] == "1":
            lay()
        return build.run(run.config)

    began = time.monotonic()
    assert exit_codes(2, lambda: run_cli(one_rank)) == [1, 2]
    assert time.monotonic() - began < allowed(40)
    assert "[rank 1] error: out of memory before the first step: rank 1 wanted" in capfd.readouterr().err
