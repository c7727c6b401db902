"""status.json is correct whatever happened: killed, refused, crashed or interrupted before training, rank 0 lost."""

import os
import shutil
import signal
import time

import pytest

from dist_trainer.run import build
from tests.distributed.small_runs import command, folder, small_config, status
from tests.faults.damage import empty
from tests.faults.faults import before_each_call, die, do, kill


def saved_and_killed(run, *, at_step, **changes):
    """The run, killed at that step, with the checkpoints that were due before saved."""
    saved = do(lambda trainer: trainer.checkpoints.wait(), at_step=at_step)
    assert run.start(saved, kill(at_step=at_step), config=run.but(**changes)).was_killed


# ------------------------------------------------------------------------------------------------ killed


def test_the_time_of_a_write_is_known_after_a_kill_and_before_the_next_attempt_has_saved(run):
    saved_and_killed(run, at_step=4)
    seconds = run.status()["checkpoint_seconds"]
    assert seconds > 0
    assert run.start(kill(at_step=5)).was_killed, "before a save of its own"
    assert run.status()["checkpoint_seconds"] == seconds
    assert run.status()["state"] == "running"


def test_steps_are_lost_whether_or_not_they_were_logged(run, undisturbed):
    """Saved at 5 and 10, logged at 1 and 10: nine steps are noted when the tenth kills."""
    config = {"tracking__log_every_steps": 10, "checkpoint__every_steps": 100}
    saved_and_killed(run, at_step=10, **config)
    assert run.saved_steps() == [5]
    assert [line["step"] for line in run.lines()] == [1]
    assert run.start(config=run.but(**config)).code == 0
    ended = run.status()
    assert (ended["restarts"], ended["lost_steps"]) == (1, 4)
    assert ended["best_loss"] == undisturbed.status()["best_loss"]


def test_steps_are_lost_once_also_if_the_next_attempt_ends_before_its_first_step(run):
    seldom = run.but(checkpoint__every_steps=100)
    saved_and_killed(run, at_step=8, checkpoint__every_steps=100)
    assert run.start(before_each_call(die, build.Trainer, "train_step"), config=seldom).was_killed
    assert run.status()["lost_steps"] == 2
    assert run.start(config=seldom).code == 0
    assert (run.status()["restarts"], run.status()["lost_steps"]) == (2, 2)


def test_if_rank_0_is_killed_another_rank_records_it(stories, tmp_path):
    config = small_config(stories, tmp_path)

    def die_in_step_7(trainer):
        train_step = trainer.train_step

        def step_or_die(*arguments):
            if trainer.progress.step == 6 and trainer.world.rank == 0:
                trainer.checkpoints.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return train_step(*arguments)

        trainer.train_step = step_or_die

    assert command(config, 4, before=die_in_step_7) == [-9, 1, 1, 1]
    ended = status(config)
    assert (ended["state"], ended["exit_code"], ended["max_steps"]) == ("failed", 1, 12)
    assert ended["step"] in (5, 6)
    assert ended["reason"].startswith("rank 0 on ")
    assert "is gone" in ended["reason"]
    assert (ended["best_step"], ended["restarts"]) == (5, 0)
    assert ended["checkpoint_seconds"] > 0
    assert not list(folder(config).glob(".staging-*"))


# -------------------------------------------------------------------------- ended before training began


def test_a_refusal_is_the_outcome_of_the_run_to_resume(run):
    saved_and_killed(run, at_step=8)
    seconds = run.status()["checkpoint_seconds"]
    for checkpoint in run.checkpoints.glob("step-*"):
        empty(checkpoint / "model.safetensors")
    assert run.start().code == 2
    ended = run.status()
    assert (ended["state"], ended["exit_code"], ended["max_steps"]) == ("failed", 2, 12)
    assert "none of them is valid" in ended["reason"]
    assert (ended["best_step"], ended["checkpoint_seconds"]) == (5, seconds)
    assert ended["useful_seconds"] > 0


def test_the_refusal_of_another_config_leaves_the_status_of_the_run_in_the_folder(run):
    run.finish()
    before = (run.folder / "status.json").read_bytes()
    ended = run.start(config=run.but(optim__learning_rate=0.5))
    assert ended.code == 2
    assert "optim.learning_rate" in ended.said
    assert (run.folder / "status.json").read_bytes() == before


def test_but_a_run_that_was_killed_is_not_called_running_after_that(run):
    saved_and_killed(run, at_step=4)
    assert run.start(config=run.but(seed=8)).code == 2
    ended = run.status()
    assert (ended["state"], ended["exit_code"]) == ("failed", None)
    assert ended["reason"].startswith("killed without a message; a later start was refused: ")


def test_a_run_that_was_to_replace_another_and_could_not_start_leaves_its_status(run, tmp_path):
    run.finish()
    before = (run.folder / "status.json").read_bytes()

    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)

    gone = run.but(checkpoint__resume="never", data__dataset=str(tmp_path / "gone.jsonl"))
    assert run.start(config=gone).code == 2
    never = run.but(checkpoint__resume="never")
    assert run.start(before_each_call(interrupt, build, "build_model"), config=never).code == 75
    assert (run.folder / "status.json").read_bytes() == before


@pytest.mark.parametrize("is_new", [True, False])
def test_a_crash_before_training_is_recorded(run, is_new):
    if not is_new:
        saved_and_killed(run, at_step=8)

    def crash():
        raise ZeroDivisionError("one over nothing")

    assert run.start(before_each_call(crash, build, "build_model")).code == 1
    ended = run.status()
    assert (ended["state"], ended["exit_code"], ended["max_steps"]) == ("failed", 1, 12)
    assert ended["reason"] == "ZeroDivisionError: one over nothing"
    assert (ended["step"], ended["best_step"]) == ((0, None) if is_new else (6, 5))


def test_a_signal_before_training_keeps_what_is_known_of_the_run(run):
    saved_and_killed(run, at_step=8)
    before = run.status()
    empty(run.newest() / "model.safetensors")

    def interrupt():
        os.kill(os.getpid(), signal.SIGUSR1)

    assert run.start(before_each_call(interrupt, build, "build_model")).code == 75
    ended = run.status()
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("preempted", "SIGUSR1", 75)
    assert (ended["step"], ended["best_step"]) == (5, 5), "the newest checkpoint is damaged"
    assert ended["checkpoint_seconds"] == before["checkpoint_seconds"]
    assert 0 < ended["useful_seconds"] < ended["wall_seconds"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_lost_before_training_is_named(stories, tmp_path, monkeypatch, rank, fault):
    build_model = build.build_model

    def build_or_fall(*arguments):
        if int(os.environ["RANK"]) == rank:
            time.sleep(1.5)  # some signs of life first
            os.kill(os.getpid(), fault)
        return build_model(*arguments)

    monkeypatch.setattr(build, "build_model", build_or_fall)
    config = small_config(stories, tmp_path, distributed__hang_timeout_minutes=0.1)
    assert sorted(command(config, 2)) == [-9, 1]
    ended = status(config)
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("failed", 1, 0)
    assert ended["reason"].startswith(f"rank {rank} on ")
    assert "preparing" in ended["reason"]


# ------------------------------------------------------------------------------------- everything saved is gone


@pytest.mark.parametrize("also_gone", [[], ["logs"], ["status.json"]], ids=["only these", "logs too", "status too"])
def test_with_its_checkpoints_gone_a_run_stops_and_changes_nothing(run, undisturbed, also_gone):
    saved_and_killed(run, at_step=8)
    shutil.rmtree(run.checkpoints)
    for name in also_gone:
        path = run.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (run.folder / "metrics.jsonl").read_bytes()
    for _ in range(2):
        ended = run.start()
        assert ended.code == 2
        assert "contains no checkpoint, but this run has saved some" in ended.said
        assert "--checkpoint.resume never" in ended.said
        assert (run.folder / "metrics.jsonl").read_bytes() == before
        assert run.status()["state"] == "failed"
    assert run.start(config=run.but(checkpoint__resume="never")).code == 0
    run.equals(undisturbed)


def test_a_run_that_was_killed_before_its_first_save_starts_at_step_0(run, undisturbed):
    assert run.start(kill(at_step=2)).was_killed
    shutil.rmtree(run.checkpoints)
    run.finish()
    run.equals(undisturbed)
