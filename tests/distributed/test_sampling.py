"""Samples of text while training: when they come, that training does not notice, and what a signal does to one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from dist_trainer.generation.samples import TextSamples
from dist_trainer.tracking.throughput import Throughput
from dist_trainer.training.trainer import Trainer
from tests.distributed.small_runs import losses, metrics, run, same_weights, small_config, status

SAMPLED = {"tracking__sample_tokens": 6, "tracking__sample_prompt": "It is a truth"}


def steps_of_samples(config: Any) -> list[int]:
    return [line["step"] for line in metrics(config, "sample")]


def text_samples(trainer: Trainer) -> TextSamples:
    [samples] = [callback for callback in trainer.callbacks.callbacks if isinstance(callback, TextSamples)]
    return samples


def stop_within_sample(step: int) -> Callable[[Trainer], None]:
    """Ask rank 0 to stop, as a signal would, after some tokens of the sample that follows `step`."""

    def change(trainer: Trainer) -> None:
        samples = text_samples(trainer)
        sample = samples._sample

        def interrupted_sample(model: Any, interrupted: Callable[[], bool]) -> Any:
            asked = iter(range(99))

            def interrupted_soon() -> bool:
                if trainer.progress.step == step and next(asked) == 3:
                    trainer.world.stop_request.signal_number = 15
                return interrupted()

            return sample(model, interrupted_soon)

        samples._sample = interrupted_sample if trainer.world.is_main else None

    return change


def slow_samples(trainer: Trainer) -> None:
    """Let a thousand seconds pass, on the clock that steps are timed by, with each sample."""
    samples, passed = text_samples(trainer), [0.0]
    sample = samples._sample
    trainer.throughput = Throughput(trainer.world, dtype="fp32", clock=lambda: time.perf_counter() + passed[0])

    def slow(model: Any, interrupted: Callable[[], bool]) -> Any:
        passed[0] += 1000.0
        return sample(model, interrupted)

    samples._sample = slow


def test_training_is_bit_for_bit_the_same_with_samples_and_without_and_their_time_is_no_part_of_a_steps(stories, tmp_path):
    silent = small_config(stories, tmp_path / "silent", model__dropout=0.3, tracking__sample_every_steps=0, **SAMPLED)
    talking = small_config(stories, tmp_path / "talking", model__dropout=0.3, tracking__sample_every_steps=1, **SAMPLED)
    assert run(silent, 1) == [0]
    assert run(talking, 1, before=slow_samples) == [0]
    assert steps_of_samples(silent) == []
    assert steps_of_samples(talking) == list(range(1, 13))
    assert losses(talking) == losses(silent)
    assert losses(talking, "validation") == losses(silent, "validation")
    assert same_weights(talking, silent)
    assert max(line["step_seconds"] for line in metrics(talking)) < 100
    assert all(0 < line["seconds"] < 100 for line in metrics(talking, "sample"))


def fail_to_sample(trainer: Trainer) -> None:
    """As a model does that cannot be asked for its next token."""

    def failing(model: Any, interrupted: Callable[[], bool]) -> Any:
        raise TypeError("forward() got an unexpected keyword argument 'use_cache'")

    text_samples(trainer)._sample = failing if trainer.world.is_main else None


def test_a_sample_that_fails_costs_a_warning_and_not_the_run(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path, train__max_steps=2, tracking__sample_every_steps=1, **SAMPLED)
    assert run(config, 2, before=fail_to_sample) == [0, 0]
    assert status(config)["state"] == "finished"
    assert steps_of_samples(config) == []
    said = capfd.readouterr().err
    assert said.count("no text sample (TypeError: forward() got an unexpected keyword argument 'use_cache')") == 2


@pytest.mark.parametrize(("every", "steps"), [(None, [4, 8, 12]), pytest.param(5, [5, 10, 12], marks=pytest.mark.slow)])
def test_samples_follow_validations_or_come_by_steps_and_at_the_end(stories, tmp_path, every, steps):
    config = small_config(stories, tmp_path, validation__every_steps=4, tracking__sample_every_steps=every, **SAMPLED)
    assert run(config, 1) == [0]
    assert steps_of_samples(config) == steps


@pytest.mark.parametrize("step", [pytest.param(6, marks=pytest.mark.slow), 12], ids=["in the middle", "after the last step"])
def test_a_signal_interrupts_a_sample_at_once_and_the_next_start_takes_it_again(stories, tmp_path, step):
    undisturbed = small_config(stories, tmp_path / "undisturbed", tracking__sample_every_steps=3, **SAMPLED)
    assert run(undisturbed, 2) == [0, 0]
    config = small_config(stories, tmp_path / "stopped", tracking__sample_every_steps=3, **SAMPLED)
    assert run(config, 2, before=stop_within_sample(step)) == [0, 0]
    assert (status(config)["state"], status(config)["step"]) == ("preempted", step)
    assert step not in steps_of_samples(config)
    for _ in range(2):  # the second start finds nothing left to do
        assert run(config, 2) == [0, 0]
        assert status(config)["state"] == "finished"
        assert steps_of_samples(config) == [3, 6, 9, 12]
    texts = [[line["text"] for line in metrics(each, "sample")] for each in (config, undisturbed)]
    assert texts[0] == texts[1]
    assert losses(config) == losses(undisturbed)
