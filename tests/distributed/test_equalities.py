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

SAME_CURVE = {
    "dropout and padding": ((1, 2, 4), {"model__dropout": 0.2, "data__packing": False}),
    "muon, dropout and padding": ((1, 2, 4), {"optim__name": "muon", "model__dropout": 0.2, "data__packing": False}),
    "bf16": ((1, 2), {"precision__dtype": "bf16"}),
    "documents kept apart": ((1, 2), {"data__document_mask": True}),
}


@pytest.mark.parametrize("case", SAME_CURVE)
def test_one_process_and_several_ranks_have_the_same_loss_curve(stories, tmp_path, case):
    """Packed sequences in fp32: below, where one run is resumed on other numbers of ranks."""
    world_sizes, changes = SAME_CURVE[case]
    curves, tokens = {}, {}
    for world_size in world_sizes:
        config = small_config(stories, tmp_path / str(world_size), **changes)
        assert run(config, world_size) == [0] * world_size
        curves[world_size] = losses(config)
        assert len(curves[world_size]) == 12
        tokens[world_size] = [line["tokens"] for line in metrics(config)]
    tolerance = 2e-3 if "precision__dtype" in changes else 2e-5
    for world_size in world_sizes[1:]:
        assert tokens[world_size] == tokens[1]
        assert curves[world_size] == pytest.approx(curves[1], abs=tolerance)
    assert curves[1][-1] < curves[1][0] - (0.15 if "optim__name" in changes else 0.3)


def test_weights_stay_the_same_on_every_rank_to_the_last_bit(stories, tmp_path):
    """With Muon, which updates embeddings and norms by AdamW."""

    def compare_after_each_step(trainer):
        train_step = trainer.train_step

        def step_and_compare(*arguments):
            result = train_step(*arguments)
            bits = b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.parameters)
            assert len(set(gather_objects(hashlib.sha256(bits).hexdigest(), trainer.world))) == 1
            return result

        trainer.train_step = step_and_compare

    config = small_config(stories, tmp_path, optim__name="muon")
    assert command(config, 4, before=compare_after_each_step) == [0] * 4


def test_the_number_of_accumulation_steps_does_not_matter(stories, tmp_path):
    curves = []
    for micro in (8, 2, 1):
        config = small_config(stories, tmp_path / str(micro), batch__micro_batch_size=micro, data__packing=False)
        run(config, 1)
        curves.append(losses(config))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], abs=2e-5)


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


RESUMED = {
    "one rank, dropout, padding": (1, (3, 7), {"model__dropout": 0.3, "data__packing": False}),
    "two ranks, dropout, documents kept apart": (2, (7,), {"model__dropout": 0.3, "data__document_mask": True}),
    "fp16": (1, (7,), {"precision__dtype": "fp16"}),
    "muon, bf16": (1, (7,), {"optim__name": "muon", "precision__dtype": "bf16"}),
    "muon, fp16 on two ranks": (2, (7,), {"optim__name": "muon", "precision__dtype": "fp16"}),
    "muon, four ranks, dropout": (4, (3,), {"optim__name": "muon", "model__dropout": 0.3}),
}
"""The number of ranks, the steps after which the run is stopped, and what is changed."""


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_that_is_stopped_and_continued_is_bitwise_the_undisturbed_one(stories, tmp_path, case):
    world_size, stopped_after, changes = RESUMED[case]
    undisturbed = small_config(stories, tmp_path / "undisturbed", **changes)
    run(undisturbed, world_size)
    config = small_config(stories, tmp_path / "stopped", **changes)
    for step in stopped_after:
        codes = run(config, world_size, before=stop_after(step, rank=world_size - 1))
        assert codes == ([75] if world_size == 1 else [0] * world_size)
        assert status(config)["state"] == "preempted"
        assert status(config)["reason"] == "SIGTERM"
        # The facts of a step are exchanged while the one before it runs.
        assert status(config)["step"] in (step, step + 1)
    assert run(config, world_size) == [0] * world_size
    assert losses(config) == losses(undisturbed)
    assert losses(config, "validation") == losses(undisturbed, "validation")
    assert [line["step"] for line in metrics(config)] == list(range(1, 13))
    assert same_weights(config, undisturbed)
    assert scaler_state(config) == scaler_state(undisturbed)
    assert status(config)["state"] == "finished"


def scaler_state(config):
    """Of fp16, which the losses do not show: a scale is a power of two."""
    return json.loads((folder(config) / "checkpoints" / "latest" / "trainer_state.json").read_text())["scaler"]


def test_a_run_resumes_with_the_same_global_batches_on_other_numbers_of_ranks(stories, tmp_path):
    undisturbed = small_config(stories, tmp_path / "undisturbed")
    run(undisturbed, 1)
    config = small_config(stories, tmp_path / "wandering")
    for world_size, step in ((1, 3), (2, 6), (4, 9)):
        run(config, world_size, before=stop_after(step))
    run(config, 1)
    assert losses(config) == pytest.approx(losses(undisturbed), abs=2e-5)
    assert [line["tokens"] for line in metrics(config)] == [line["tokens"] for line in metrics(undisturbed)]


@pytest.mark.parametrize("micro_batch_size", [2, None])
def test_one_warning_says_that_another_number_of_ranks_changes_the_dropout_masks(stories, tmp_path, micro_batch_size, capfd):
    config = small_config(stories, tmp_path, model__dropout=0.1, batch__micro_batch_size=micro_batch_size)
    run(config, 2, before=stop_after(3))
    run(config, 1, before=stop_after(6))
    said = [line for line in capfd.readouterr().err.splitlines() if "(was 2)" in line]
    assert len(said) == 1
    assert ("dropout masks differ" in said[0]) == (micro_batch_size is None)


def test_starting_a_finished_run_again_says_so_and_changes_nothing(stories, tmp_path, capfd):
    config = small_config(stories, tmp_path)
    run(config, 1)
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
