"""What makes the trainer trustworthy: one loss curve, however the work is shared out, stopped and gone on with."""

import hashlib
import json

import pytest

from dist_trainer.distributed.collectives import gather_objects
from tests.distributed.small_runs import (
    changed,
    command,
    folder,
    losses,
    metrics,
    run,
    same_weights,
    small_config,
    status,
    stop_after,
)

DROPOUT_AND_PADDING = {"model__dropout": 0.2, "data__packing": False}
SAME_CURVE = {
    "dropout and padding": (2, DROPOUT_AND_PADDING),
    # Micro-batches of one sequence: two on each of four ranks.
    "muon, dropout, documents kept apart": (
        4,
        {"optim__name": "muon", "model__dropout": 0.2, "data__document_mask": True, "batch__micro_batch_size": 1},
    ),
    "bf16": (2, {"precision__dtype": "bf16"}),
}
"""The number of ranks that is compared with one process, and what is changed."""


def compare_weights_after_each_step(trainer):
    """To the last bit, over all ranks."""
    train_step = trainer.train_step

    def step_and_compare(*arguments):
        result = train_step(*arguments)
        bits = b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.parameters)
        assert len(set(gather_objects(hashlib.sha256(bits).hexdigest(), trainer.world))) == 1
        return result

    trainer.train_step = step_and_compare


def numbers(config):
    """Losses, gradient norms and validation losses, of which each bit counts."""
    return [(line["loss"], line["grad_norm"]) for line in metrics(config)], losses(config, "validation")


@pytest.mark.parametrize("case", SAME_CURVE)
def test_one_process_and_several_ranks_have_the_same_bits_and_all_ranks_after_each_step(stories, tmp_path, undisturbed, case):
    """AdamW on four ranks: below, where one run is resumed on other numbers of ranks."""
    world_size, changes = SAME_CURVE[case]
    alone, config = undisturbed(1, changes), small_config(stories, tmp_path, **changes)
    assert run(config, world_size, before=compare_weights_after_each_step) == [0] * world_size
    assert [line["tokens"] for line in metrics(config)] == [line["tokens"] for line in metrics(alone)]
    curve = losses(alone)
    assert len(curve) == 12
    assert numbers(config) == numbers(alone)
    assert same_weights(config, alone)
    assert curve[-1] < curve[0] - (0.15 if "optim__name" in changes else 0.3)


def test_fast_sums_give_the_same_curve_but_for_rounding(stories, tmp_path, undisturbed):
    alone = undisturbed(1, DROPOUT_AND_PADDING)
    config = small_config(stories, tmp_path, **DROPOUT_AND_PADDING, distributed__reduction="fast")
    assert run(config, 2) == [0, 0]
    assert losses(config) == pytest.approx(losses(alone), abs=2e-5)


def test_the_number_of_accumulation_steps_does_not_matter(stories, tmp_path):
    curves = []
    for micro in (8, 1):
        config = small_config(
            stories, tmp_path / str(micro), batch__micro_batch_size=micro, data__packing=False, train__max_steps=6
        )
        run(config, 1)
        curves.append(losses(config))
    assert curves[1] == pytest.approx(curves[0], abs=2e-5)


def test_validation_is_the_same_number_on_any_number_of_ranks(stories, tmp_path):
    found = set()
    for world_size in (1, 4):
        # A learning rate of almost nothing: equal weights, so that only validation could differ.
        config = small_config(
            stories,
            tmp_path / str(world_size),
            optim__learning_rate=1e-30,
            optim__weight_decay=0.0,
            train__max_steps=1,
            batch__micro_batch_size=1,
        )
        run(config, world_size)
        [line] = metrics(config, "validation")
        found.add((line["loss"], line["tokens"]))
    assert len(found) == 1


# Of a quarter of the tokens, on which CPUs without fp16 need long.
FP16 = {"precision__dtype": "fp16", "batch__global_batch_size": 4, "batch__micro_batch_size": 1, "data__sequence_length": 16}
RESUMED = {
    "one rank, dropout, padding": (1, (3, 7), DROPOUT_AND_PADDING),
    "fp16": (1, (7,), FP16),
    "muon, fp16 on two ranks": (2, (7,), {"optim__name": "muon", **FP16}),
    "muon, bf16, four ranks, dropout, documents kept apart": (
        4,
        (3,),
        {"optim__name": "muon", "precision__dtype": "bf16", "model__dropout": 0.3, "data__document_mask": True},
    ),
}
"""The number of ranks, the steps after which the run is stopped, and what is changed."""


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_is_stopped_and_continued_is_bitwise_the_undisturbed_one(stories, tmp_path, undisturbed, case):
    """AdamW on two ranks: tests/faults, by kills too."""
    world_size, stopped_after, changes = RESUMED[case]
    expected, config = undisturbed(world_size, changes), small_config(stories, tmp_path, **changes)
    for step in stopped_after:
        codes = run(config, world_size, before=stop_after(step, rank=world_size - 1))
        assert codes == ([75] if world_size == 1 else [0] * world_size)
        assert status(config)["state"] == "preempted"
        assert status(config)["reason"] == "SIGTERM"
        # The facts of a step are exchanged while the one before it runs.
        assert status(config)["step"] in (step, step + 1)
    assert run(config, world_size) == [0] * world_size
    assert losses(config) == losses(expected)
    assert losses(config, "validation") == losses(expected, "validation")
    assert [line["step"] for line in metrics(config)] == list(range(1, 13))
    assert same_weights(config, expected)
    assert scaler_state(config) == scaler_state(expected)
    assert status(config)["state"] == "finished"


def scaler_state(config):
    """Of fp16, which the losses do not show: a scale is a power of two."""
    return json.loads((folder(config) / "checkpoints" / "latest" / "trainer_state.json").read_text())["scaler"]


def test_a_run_resumes_with_the_same_global_batches_on_other_numbers_of_ranks(stories, tmp_path, undisturbed, capfd):
    """And the same bits, so with the same dropout masks too: they follow the micro-batches, not the ranks."""
    expected, config = undisturbed(1, DROPOUT_AND_PADDING), small_config(stories, tmp_path, **DROPOUT_AND_PADDING)
    for world_size, step in ((1, 3), (2, 6), (4, 9)):
        run(config, world_size, before=stop_after(step))
    capfd.readouterr()
    run(config, 1)
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "(was 4)" in line]
    assert "the same curve, to the last bit" in said
    assert numbers(config) == numbers(expected)
    assert same_weights(config, expected)
    assert [line["tokens"] for line in metrics(config)] == [line["tokens"] for line in metrics(expected)]


def test_one_warning_says_that_other_micro_batches_make_another_curve(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path, model__dropout=0.1, batch__micro_batch_size=None)
    run(config, 2, before=stop_after(3))
    run(changed(config, batch__micro_batch_size=4), 1, before=stop_after(4))
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "resuming with" in line]
    assert "1 rank (was 2), micro-batches of 4 sequences (was 1): another curve from here on" in said
    assert "dropout masks differ" in said


def test_starting_a_finished_run_again_says_so_and_changes_nothing(undisturbed, capfd):
    config = undisturbed(1, DROPOUT_AND_PADDING)
    before = losses(config)
    assert run(config, 2) == [0, 0]
    assert "already finished its 12 steps" in capfd.readouterr().err
    assert losses(config) == before


def test_masked_documents_have_the_validation_loss_of_one_document_per_sequence(stories, tmp_path):
    found = []
    for changes in ({"data__document_mask": True}, {"data__packing": False}, {}):
        # A learning rate of almost nothing: equal weights. Rows as long as any document: none is cut.
        changes |= {"data__sequence_length": 512, "optim__learning_rate": 1e-30, "optim__weight_decay": 0.0}
        changes |= {"batch__global_batch_size": 2, "batch__micro_batch_size": 1, "train__max_steps": 1}
        config = small_config(stories, tmp_path / str(len(found)), **changes)
        assert run(config, 1) == [0]
        [line] = metrics(config, "validation")
        found.append((line["loss"], line["tokens"]))
    (apart, tokens), (separate, separate_tokens), (together, _) = found
    assert tokens == separate_tokens
    assert apart == pytest.approx(separate, abs=1e-6)
    assert together != pytest.approx(separate, abs=1e-4)


def test_a_run_does_not_resume_with_a_document_mask_that_it_did_not_have(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path)
    run(config, 1, before=stop_after(3))
    assert command(changed(config, data__document_mask=True), 1) == [2]
    assert "data.document_mask: true, but the run started with false" in capfd.readouterr().err
