"""Resuming: from Python, after a launcher's restart, with moved or changed data; and the status meanwhile."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_trainer import CheckpointManager, Trainer, build_optimizer, create_dataloaders, make_weight_saver, parallelize
from dist_trainer.checkpoint.folders import step_folders
from dist_trainer.config.schema import BatchConfig, CheckpointConfig, OptimConfig, TrainConfig, TrainingConfig
from dist_trainer.data.datasets import CORPUS
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.distributed.launch_env import is_restarted_by, launcher_id
from dist_trainer.errors import ConfigError
from dist_trainer.tracking import status as status_file
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import changed, folder, losses, metrics, run, same_weights, small_config, status, stop_after
from tests.distributed.test_agreement import poison


def train_own_model(path: Path, max_steps: int) -> list[float]:
    """A module of one's own, saved and resumed through the public names; its weights at the end."""
    config = TrainingConfig(
        batch=BatchConfig(global_batch_size=8, micro_batch_size=2),
        optim=OptimConfig(learning_rate=1e-2, weight_decay=0.0),
        train=TrainConfig(max_steps=12),
        checkpoint=CheckpointConfig(every_steps=2),
    )
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    pairs = [(x, (x.sum() > 0).long()) for x in inputs]
    with init_distributed(config.distributed) as world:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
        checkpoints = CheckpointManager(path, config.checkpoint, save_model_fn=make_weight_saver(model))
        train, _ = create_dataloaders(config, world, train_dataset=pairs)  # type: ignore[arg-type]
        trainer = Trainer(
            config,
            world,
            model=parallelize(model, world),
            optimizer=build_optimizer(config.optim, model),
            train_data=train,
            checkpoints=checkpoints,
        )
        is_resumed = trainer.resume(path)
        assert is_resumed == (trainer.progress.step > 0)
        if max_steps < trainer.max_steps:
            stop_after(max_steps)(trainer)
        trainer.fit()
        return [float(p.detach().double().sum()) for p in model.parameters()]


def test_a_module_of_ones_own_is_saved_and_resumed_exactly_on_two_ranks(tmp_path):
    undisturbed = run_ranks(2, lambda: train_own_model(tmp_path / "undisturbed", 12))
    run_ranks(2, lambda: train_own_model(tmp_path / "stopped", 5))
    assert step_folders(tmp_path / "stopped")[0].name < "step-00000012"
    assert run_ranks(2, lambda: train_own_model(tmp_path / "stopped", 12)) == undisturbed


def test_a_config_made_in_python_is_checked_before_training():
    config = TrainingConfig(optim=OptimConfig(betas=(2.0, 0.9)))
    with pytest.raises(ConfigError, match=r"optim\.betas"):
        Trainer(config, DistributedContext.single(), model=nn.Linear(1, 1), optimizer=None, train_data=None)  # type: ignore[arg-type]


def test_ranks_that_torchrun_restarts_resume_also_with_resume_never(stories, tmp_path, monkeypatch):
    config = small_config(stories, tmp_path, checkpoint__resume="never")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run(config, 1, before=stop_after(6))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(config, 1) == [0]
    assert not list(folder(config).glob("archived-*"))
    assert [line["step"] for line in metrics(config)] == list(range(1, 13))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "8")
    assert run(config, 1) == [0]
    assert list(folder(config).glob("archived-*")), "another launch starts over"


def test_a_launcher_is_known_by_its_run_and_process():
    first = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    assert launcher_id({}) is None
    assert str(os.getppid()) in launcher_id(first)
    assert not is_restarted_by(launcher_id(first), first)
    assert is_restarted_by(launcher_id(first), {**first, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert not is_restarted_by(None, {"TORCHELASTIC_RESTART_COUNT": "1"})


def test_changed_validation_text_is_rejected_on_resume(stories, tmp_path):
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(stories.read_text().splitlines(keepends=True)[:4]))
    config = small_config(stories, tmp_path / "runs", data__validation_dataset=str(validation))
    run(config, 1, before=stop_after(6))
    validation.write_text("".join(stories.read_text().splitlines(keepends=True)[4:8]))
    with pytest.raises(AssertionError, match=r"data\.validation_dataset: the text in .*\.jsonl has changed since"):
        run(config, 1)
    assert status(config)["state"] == "preempted", "a refusal touches nothing"


def test_the_same_text_under_another_path_resumes_the_run(stories, tmp_path, undisturbed):
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        shutil.copytree(CORPUS / "tokenizer", place / "tokenizer")
        (place / "stories.jsonl").write_text(stories.read_text())
    config = small_config(first / "stories.jsonl", tmp_path, data__tokenizer=str(first / "tokenizer"))
    run(config, 1, before=stop_after(6))
    shutil.rmtree(first)
    moved = small_config(second / "stories.jsonl", tmp_path, data__tokenizer=str(second / "tokenizer") + "/")
    (second / "stories.jsonl").write_text(stories.read_text().replace(" the ", " this "))
    with pytest.raises(AssertionError, match=r"data\.dataset: '.*second/stories\.jsonl', but the run started with '.*first/"):
        run(changed(moved, data__cache_dir=str(tmp_path / "empty")), 1)
    assert not list((tmp_path / "empty").glob("tokens/*")), "before it is tokenised"
    assert status(config)["state"] == "preempted", "a refusal touches nothing"
    (second / "stories.jsonl").write_text(stories.read_text())
    with pytest.raises(AssertionError, match=r"data\.validation_dataset: '.*stories\.jsonl', but the run started with null"):
        run(changed(moved, data__validation_dataset=str(second / "stories.jsonl")), 1)
    assert run(moved, 1) == [0]
    assert losses(moved) == losses(undisturbed(1, {}))


def test_skipped_updates_are_counted_over_a_restart_and_the_step_that_ends_a_run_has_its_line(stories, tmp_path):
    config = small_config(stories, tmp_path, train__on_non_finite="skip", checkpoint__every_steps=1)

    def skip_then_stop(trainer):
        poison(5, rank=0)(trainer)
        stop_after(7)(trainer)

    run(config, 1, before=skip_then_stop)
    assert run(config, 1) == [0]
    assert metrics(config)[-1]["skipped_steps"] == 1

    diverging = small_config(stories, tmp_path / "diverging", tracking__log_every_steps=5)
    with pytest.raises(AssertionError, match="TrainingDivergedError: step 7"):
        run(diverging, 2, before=poison(7, rank=1, value=float("nan")))
    last = metrics(diverging)[-1]
    assert (last["step"], last["loss"], last["skipped"]) == (7, None, True)


def test_resuming_another_finished_run_leaves_no_folder(stories, tmp_path):
    config = small_config(stories, tmp_path)
    run(config, 1)
    another = small_config(stories, tmp_path, run_name="another", checkpoint__resume=str(folder(config)))
    assert run(another, 1) == [0]
    assert not folder(another).exists()


def test_initial_weights_may_be_gone_when_the_run_is_resumed(stories, tmp_path):
    first = small_config(stories, tmp_path / "first")
    run(first, 1)
    weights = (folder(first) / "checkpoints" / "latest").resolve()
    config = small_config(stories, tmp_path / "second", model__init_from=str(weights))
    run(config, 1, before=stop_after(6))
    weights.rename(tmp_path / "gone")
    with pytest.raises(AssertionError, match=r"model\.init_from: '.*/gone', but the run started with"):
        run(changed(config, model__init_from=str(tmp_path / "gone")), 1)
    assert run(changed(config, model__init_from=f"{weights}/"), 1) == [0]
    undisturbed = small_config(stories, tmp_path / "third", model__init_from=str(tmp_path / "gone"))
    run(undisturbed, 1)
    assert losses(config) == losses(undisturbed)
    assert same_weights(config, undisturbed)


def test_status_follows_the_run(stories, tmp_path, monkeypatch):
    monkeypatch.setattr(status_file, "SECONDS_BETWEEN", 0.0)
    config = small_config(stories, tmp_path)

    def look(trainer):
        train_step = trainer.train_step

        def step(*arguments):
            now = json.loads((folder(config) / "status.json").read_text())
            assert (now["state"], now["step"], now["max_steps"]) == ("running", trainer.progress.step, 12)
            return train_step(*arguments)

        trainer.train_step = step

    assert run(config, 1, before=look) == [0]
    assert status(config)["state"] == "finished"


def test_without_a_micro_batch_size_validation_is_the_same_number_on_any_number_of_ranks(stories, tmp_path):
    found = []
    for world_size in (1, 4):
        config = small_config(
            stories, tmp_path / str(world_size), batch__micro_batch_size=None, optim__learning_rate=1e-30, train__max_steps=1
        )
        run(config, world_size)
        found.append(losses(config, "validation"))
    assert found[0] == found[1]


def test_a_finished_run_made_longer_names_the_learning_rates_that_its_metrics_show(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path)
    run(config, 1)
    longer = changed(config, train__max_steps=24)
    capfd.readouterr()
    assert run(longer, 2) == [0, 0]
    last, following = (next(line["lr"] for line in metrics(longer) if line["step"] == step) for step in (12, 13))
    assert following > 2 * last
    found = [line for line in capfd.readouterr().err.splitlines() if "the learning rate changes" in line]
    assert len(found) == 1
    assert f"warning: the learning rate changes from {last:.3g} at step 12 to {following:.3g} at step 13" in found[0]
    run(longer, 1)
    assert "the learning rate changes" not in capfd.readouterr().err
