"""A dry run says what the run will do and need, and leaves no trace."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import CheckpointError
from dist_trainer.run.build import build_trainer
from dist_trainer.run.cli import run_cli
from dist_trainer.run.dry_run import build_without_folder, dry_run, largest_step, measure
from dist_trainer.run.folder import RunFolder
from dist_trainer.run.resume import ResumeState, preview_resume
from dist_trainer.run.summary import format_header
from tests.distributed.ranks import exit_codes
from tests.distributed.small_runs import changed, folder, run, small_config, stop_after
from tests.faults.faults import poison_gradient

REPOSITORY = Path(__file__).resolve().parents[2]


def dry(config, world_size: int = 1) -> list[int | None]:
    return exit_codes(world_size, lambda: run_cli(lambda: dry_run(config)))


def everything_in(path: Path) -> dict[str, tuple[bytes | str, int]]:
    """Each file's and link's content, and when it was written."""
    found = {}
    for file in sorted(path.rglob("*")):
        content = str(file.readlink()) if file.is_symlink() else file.read_bytes() if file.is_file() else ""
        found[str(file.relative_to(path))] = (content, file.lstat().st_mtime_ns)
    return found


def test_it_says_what_a_run_needs_and_leaves_no_folder(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path / "two words")
    assert dry(config, 2) == [0, 0]
    assert not (tmp_path / "two words").exists()
    said = capfd.readouterr().err
    assert "dry run of run: steps 1-12\n" in said
    assert "output     none; a run writes report.html, metrics.jsonl, checkpoints/ and logs/ in " in said
    assert "2 ranks x " in said
    assert re.search(r"time +\S+ s per step \(\S+ tokens/s\): 12 steps and 3 validations of \S+ s take about ", said)
    assert re.search(r"memory +at most \S+ [MG]iB of this machine's .* on rank [01], at least \S+ [MG]iB; 2 processes", said)
    assert "Traceback" not in said
    assert f"dry run OK; nothing written to {folder(config)}" in said


def test_it_reports_a_disk_too_small_for_the_checkpoints(stories, tmp_path, monkeypatch, capfd):
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk._replace(free=1024))
    assert dry(small_config(stories, tmp_path)) == [0]
    said = capfd.readouterr().err
    assert "the disk has too little space for its checkpoints" in said
    assert re.search(r"disk +\S+ MiB per checkpoint, up to 12 kept \(\S+ MiB\); 1.00 KiB free", said)


def test_a_nonfinite_first_loss_ends_it_as_it_would_end_the_run(stories, tmp_path, capfd):
    config, poison = small_config(stories, tmp_path), poison_gradient(rank=1, at_step=1)

    def poisoned(config) -> int:
        poison()
        return run_cli(lambda: dry_run(config))

    assert exit_codes(2, lambda: poisoned(config)) == [3, 3]
    said = capfd.readouterr().err
    assert said.count("dist_trainer: dry run: step 1 has a loss of nan and a gradient norm of nan; check the weights and") == 1
    assert "--precision.dtype fp32" in said
    assert not folder(config).exists()
    assert exit_codes(2, lambda: poisoned(changed(config, train__on_non_finite="skip"))) == [0, 0]
    said = capfd.readouterr().err
    assert "this update and the following ones would be skipped" in said
    assert "dry run works, but the first loss is not finite; nothing written to" in said


def test_so_does_a_nonfinite_first_gradient(stories, tmp_path, capfd, monkeypatch):
    config = small_config(stories, tmp_path)
    monkeypatch.setattr("dist_trainer.training.trainer.clip_gradients", lambda *_: torch.tensor(float("inf")))
    assert exit_codes(1, lambda: run_cli(lambda: dry_run(config))) == [3]
    assert re.search(r"step 1 has a loss of 8\.\d+ and a gradient norm of inf; check", capfd.readouterr().err)


def test_a_run_that_can_be_resumed_or_is_training_stays_unchanged(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path)
    run(config, 1, before=stop_after(6))
    running = RunFolder(folder(config))  # by this process; its forked child does not share the lock
    try:
        before = everything_in(folder(config))
        assert dry(config) == [0]
        assert everything_in(folder(config)) == before
    finally:
        running.close()
    said = capfd.readouterr().err
    assert "steps 7-12" in said
    assert "resumed after step 6" in said


def test_a_finished_a_damaged_and_another_run_are_reported_and_stay_unchanged(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path, train__max_steps=1)
    run(config, 1)
    assert dry(config) == [0]
    assert f"dry run: {folder(config)} has already finished its 1 step" in capfd.readouterr().err
    assert dry(changed(config, optim__learning_rate=1.0)) == [2]
    assert "optim.learning_rate: 1.0, but the run started with 0.01" in capfd.readouterr().err
    (weights,) = (folder(config) / "checkpoints").glob("step-*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    before = everything_in(folder(config))
    assert dry(config) == [2]
    refusals = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dist_trainer:")]
    assert len(refusals) == 1
    assert "has checkpoints but none of them is valid" in refusals[0]
    assert dry(changed(config, checkpoint__resume="never")) == [0]
    assert everything_in(folder(config)) == before


def test_a_folder_that_cannot_be_created_is_rejected(stories, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert dry(small_config(stories, tmp_path / "file" / "runs")) == [2]
    assert f"{tmp_path / 'file'} cannot be written (Not a directory)" in capfd.readouterr().err


def test_a_tracker_whose_package_is_missing_is_rejected_as_by_the_run(stories, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert dry(small_config(stories, tmp_path, tracking__trackio=True)) == [2]
    assert "tracking.trackio: true needs the package trackio" in capfd.readouterr().err


def test_a_checkpoint_that_is_replaced_meanwhile_is_searched_again(stories, tmp_path, monkeypatch):
    config = small_config(stories, tmp_path, train__max_steps=12)
    run(config, 1, before=stop_after(2))
    gone = ResumeState(tmp_path / "gone")
    found = iter([gone, preview_resume(config, folder(config)), gone, gone])
    monkeypatch.setattr("dist_trainer.run.dry_run.preview_resume", lambda *_: next(found))
    assert build_without_folder(config, DistributedContext.single()).progress.step == 2
    with pytest.raises(CheckpointError, match="gone"):
        build_without_folder(config, DistributedContext.single())


def trainer_of(config):
    return build_trainer(config, DistributedContext.single(), ResumeState())


def test_the_batch_has_the_largest_shape(stories, tmp_path):
    trainer = trainer_of(small_config(stories, tmp_path, data__packing=False, data__sequence_length=300))
    assert max(batch.input_ids.shape[1] for batch, _ in zip(trainer.train_data, range(20), strict=False)) < 300
    batches, targets = largest_step(trainer)
    assert (
        [tuple(batch.input_ids.shape) for batch in batches]
        == [tuple(batch.targets.shape) for batch in batches]
        == [(2, 300)] * 4
    )
    assert targets == sum(batch.num_targets() for batch in batches)
    cost = measure(trainer)
    assert (cost.steps, cost.validations) == (12, 3)
    assert cost.step_seconds > 0
    assert cost.validation_seconds > 0


@pytest.mark.slow  # compiling takes half a minute, and torchrun some seconds
@pytest.mark.parametrize("launcher", [["-m"], ["-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]])
def test_a_compiled_run_can_be_tried_by_the_command(tmp_path, launcher):
    words = ["--config", "configs/debug.yaml", "--dry_run", "--precision.compile", "true", "--output_dir", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, *launcher, "dist_trainer.train", *words], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert ", compiled, " in done.stderr
    assert " per step (" in done.stderr
    assert not (tmp_path / "r").exists()


def test_the_header_is_short_aligned_and_correct(stories, tmp_path):
    trainer = trainer_of(small_config(stories, tmp_path))
    warmup = trainer.config.schedule.warmup_steps
    title, *lines = format_header(trainer, tmp_path / "run").splitlines()
    assert title == f"training run: steps 1-12, output in {tmp_path / 'run'}"
    assert len(lines) < 9
    names = ["model", "tokens", "optimizer", "devices", "sums", "memory", "output", "resume"]
    assert [line[:13].rstrip() for line in lines] == [f"  {name}" for name in names]
    said = dict(line.split(maxsplit=1) for line in lines)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    assert said["model"] == f"decoder_lm, {parameters / 1000:.0f}k parameters in 2 layers of 32, random weights"
    assert said["tokens"].startswith("8 x 32 = 256 per step, 3.07k in total: ")
    assert said["optimizer"] == f"AdamW, peak learning rate 0.01 after {warmup} warmup steps, then cosine"
    assert said["devices"].endswith(", fp32, not compiled, 4 micro-batches of 2 sequences per step")
    assert said["sums"] == "exact: the same bits on 1, 2 or 4 ranks"
    weights = 4 * parameters / 1024
    size = f"{weights:.0f} KiB"
    assert said["memory"].startswith(f"{size} weights + {size} gradients + {size} partial sums + ")
    assert "no W&B" in said["output"]
    assert "saves every 4 steps" in said["resume"]
