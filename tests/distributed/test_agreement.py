"""What one rank meets, all ranks know: infinities, signals, errors; and what is exchanged when."""

import os

import pytest
import torch

from dist_trainer.config.schema import DistributedConfig
from dist_trainer.distributed.collectives import all_reduce_sum, local_rank0_first, run_on_rank0
from dist_trainer.distributed.context import DistributedContext, init_distributed
from dist_trainer.errors import ConfigError, DataError, TrainingDivergedError
from dist_trainer.parallel import compile
from dist_trainer.run import lifecycle
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import (
    at_each_validation_batch,
    command,
    folder,
    losses,
    metrics,
    on_rank,
    run,
    same_weights,
    small_config,
    status,
    stop_after,
)


def poison(step: int, *, rank: int, value: float = float("inf")):
    """Make the loss of `rank` infinite at `step`."""

    def change(trainer):
        loss_function = trainer.loss_function

        def poisoned(model, batch):
            loss = loss_function(model, batch)
            here = trainer.progress.step == step - 1 and trainer.world.rank == rank and model.training
            return loss * value if here else loss

        trainer.loss_function = poisoned

    return change


def test_an_infinity_on_one_rank_makes_every_fp16_scaler_skip_and_halve_together(stories, tmp_path):
    scales = []

    def watch(trainer):
        poison(4, rank=1)(trainer)
        train_step = trainer.train_step

        def step(*arguments):
            result = train_step(*arguments)
            scales.append(trainer.precision.scaler.get_scale())
            own = torch.tensor([scales[-1], -scales[-1]])
            total = all_reduce_sum(own.clone(), trainer.world)
            assert torch.equal(total, own * trainer.world.world_size), "the scalers differ"
            expected = 65536.0 if trainer.progress.step < 4 else 32768.0
            assert scales[-1] == expected
            return result

        trainer.train_step = step

    config = small_config(stories, tmp_path, precision__dtype="fp16")
    assert run(config, 2, before=watch) == [0, 0]
    assert [line["step"] for line in metrics(config) if line["skipped"]] == [4]
    assert metrics(config)[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them_before_the_update(stories, tmp_path, dtype):
    config = small_config(stories, tmp_path, precision__dtype=dtype, checkpoint__every_steps=3)

    with pytest.raises(AssertionError, match="TrainingDivergedError: step 5: the loss or its gradients"):
        run(config, 2, before=poison(5, rank=1, value=float("nan")))
    assert status(config)["state"] == "failed"
    assert status(config)["exit_code"] == TrainingDivergedError.exit_code
    assert sorted(p.name for p in (folder(config) / "checkpoints").glob("step-*")) == ["step-00000003"]


def test_with_the_policy_skip_the_update_is_skipped_and_training_continues(stories, tmp_path):
    config = small_config(stories, tmp_path, train__on_non_finite="skip")
    assert run(config, 2, before=poison(5, rank=1)) == [0, 0]
    lines = metrics(config)
    assert [line["step"] for line in lines if line["skipped"]] == [5]
    assert lines[-1]["step"] == 12
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_too_many_consecutive_skips_end_the_run(stories, tmp_path):
    config = small_config(stories, tmp_path, train__on_non_finite="skip", train__max_skipped_steps=2)

    def change(trainer):
        loss_function = trainer.loss_function
        trainer.loss_function = lambda model, batch: loss_function(model, batch) * float("nan")

    with pytest.raises(AssertionError, match="not finite 3 steps in a row"):
        run(config, 1, before=change)
    assert not list((folder(config) / "checkpoints").glob("step-*"))


def test_gradients_are_exchanged_once_a_step_whatever_the_accumulation(stories, tmp_path):
    counts = []

    def count(trainer):
        exchanged, reduce_bucket = [], trainer.model.bucket_hook

        def hook(bucket):
            if bucket.is_last():
                exchanged.append(trainer.progress.step)
            return reduce_bucket(bucket)

        trainer.model.reduce_buckets_with(hook)
        counts.append(exchanged)

    config = small_config(stories, tmp_path, batch__micro_batch_size=1, train__max_steps=3)

    def check(trainer):
        count(trainer)
        close = trainer.checkpoints.wait

        def at_the_end():
            close()
            assert counts[0] == [0, 1, 2], counts

        trainer.checkpoints.wait = at_the_end

    run(config, 2, before=check)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_one_rank_stops_all_at_the_same_step(stories, tmp_path, rank):
    config = small_config(stories, tmp_path)
    assert run(config, 2, before=stop_after(6, rank=rank)) == [0, 0]
    assert status(config)["state"] == "preempted"
    assert metrics(config)[-1]["step"] == status(config)["step"]


def test_a_stop_during_validation_redoes_it_and_loses_nothing(stories, tmp_path, undisturbed):
    def stop_in_validation(trainer):
        def ask():
            trainer.world.stop_request.signal_number = 10

        at_each_validation_batch(ask)(trainer)

    config = small_config(stories, tmp_path)
    assert run(config, 2, before=on_rank(1, stop_in_validation)) == [0, 0]
    assert status(config)["reason"] == "SIGUSR1"
    run(config, 2)
    expected = undisturbed(2, {})
    assert losses(config, "validation") == losses(expected, "validation")
    assert losses(config) == losses(expected)
    assert same_weights(config, expected)


def joined(function):
    def one_rank():
        with init_distributed(DistributedConfig(hang_timeout_minutes=1)) as world:
            return function(world)

    return one_rank


def test_preparation_runs_first_on_one_rank_then_on_the_others(tmp_path):
    marks = tmp_path / "marks"

    def prepare() -> list[str]:
        marks.open("a").write(f"{os.environ['RANK']}\n")
        return marks.read_text().split()

    results = run_ranks(3, joined(lambda world: local_rank0_first(world, prepare)))
    assert results[0] == ["0"]
    assert sorted(marks.read_text().split()) == ["0", "1", "2"]


def test_an_error_on_one_rank_is_raised_on_all(tmp_path):
    def fail_on_one(world: DistributedContext) -> str:
        def prepare() -> None:
            if world.rank == 1:
                raise DataError("the disk of rank 1")

        try:
            local_rank0_first(world, prepare)
        except DataError as error:
            return str(error)
        return "no error"

    assert run_ranks(3, joined(fail_on_one)) == ["the disk of rank 1"] * 3


def test_if_one_rank_cannot_compile_none_does_and_all_report_it(monkeypatch):
    monkeypatch.setattr(compile, "missing_compiler", lambda _: "what rank 1 lacks" if os.environ["RANK"] == "1" else None)

    def decide(world: DistributedContext) -> tuple[bool, str]:
        with pytest.raises(ConfigError) as refused:
            compile.should_compile(True, world, 1.0)
        return compile.should_compile("auto", world, 1e20), str(refused.value)

    assert run_ranks(2, joined(decide)) == [(False, "precision.compile: true needs what rank 1 lacks")] * 2


def test_what_the_main_rank_found_is_known_to_all():
    assert run_ranks(2, joined(lambda world: run_on_rank0(world, lambda: world.rank + 7))) == [7, 7]


def test_more_ranks_than_the_batch_divides_by_are_rejected_on_all_of_them(stories, tmp_path):
    config = small_config(stories, tmp_path, batch__micro_batch_size=4)
    with pytest.raises(AssertionError, match=r"ConfigError: batch\.global_batch_size \(8\)"):
        run(config, 4)
    assert not folder(config).exists()


def test_what_all_ranks_reject_is_reported_once(tmp_path, capfd):
    config = small_config(tmp_path / "nowhere.jsonl", tmp_path / "runs")
    assert command(config, 2) == [2, 2]
    assert capfd.readouterr().err.count("nowhere.jsonl does not exist") == 1


def test_a_stop_during_the_last_validation_is_made_up_for(stories, tmp_path):
    config = small_config(stories, tmp_path, validation__every_steps=0)

    def stop_at_the_end(trainer):
        stop_after(12)(trainer)

    assert run(config, 1, before=stop_at_the_end) == [75]
    assert status(config)["step"] == 12
    assert not metrics(config, "validation")
    assert run(config, 1) == [0]
    assert [line["step"] for line in metrics(config, "validation")] == [12]
    assert (folder(config) / "checkpoints" / "best").resolve().name == "step-00000012"


def test_a_warm_up_takes_no_batch_from_worker_processes(stories, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_trainer.training.precompile.is_compiled", lambda _: True)  # so that it warms up, but eagerly
    configs = [small_config(stories, tmp_path / str(workers), data__num_workers=workers) for workers in (0, 1)]
    for config in configs:
        assert run(config, 1) == [0]
    assert losses(configs[0]) == losses(configs[1])


def test_a_new_run_that_is_rejected_leaves_the_old_one_in_its_place(stories, tmp_path):
    config = small_config(stories, tmp_path)
    assert run(config, 1) == [0]
    nowhere = small_config(tmp_path / "nowhere.txt", tmp_path, checkpoint__resume="never")
    with pytest.raises(AssertionError, match="does not exist"):
        run(nowhere, 1)
    assert not list(folder(config).glob("archived-*"))
    (folder(config) / "archived-2").mkdir()
    assert run(small_config(stories, tmp_path, checkpoint__resume="never"), 1) == [0]
    assert (folder(config) / "archived-1" / "checkpoints" / "latest").exists()
    assert (folder(config) / "logs" / "rank-0.log").exists()


def test_a_sample_prompt_that_does_not_fit_is_rejected_on_all_ranks_at_once(stories, tmp_path):
    config = small_config(stories, tmp_path, tracking__sample_tokens=4, tracking__sample_prompt="word " * 100)

    def refused():
        with pytest.raises(ConfigError, match=r"tracking\.sample_prompt"):
            lifecycle.run(config)
        return True

    assert run_ranks(2, refused) == [True, True]
    assert not folder(config).exists()


def test_a_refused_save_in_the_middle_of_training_deletes_nothing(stories, tmp_path):
    def refuse_at_step_9(trainer):
        train_step = trainer.train_step

        def refuse(*arguments):
            if trainer.progress.step == 9:
                raise ConfigError("schedule.name: no more")
            return train_step(*arguments)

        trainer.train_step = refuse

    config = small_config(stories, tmp_path)
    with pytest.raises(AssertionError, match="no more"):
        run(config, 1, before=refuse_at_step_9)
    assert (folder(config) / "checkpoints" / "step-00000008").is_dir()
