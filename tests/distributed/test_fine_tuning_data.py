"""If only answers are trained on, ranks have different numbers of targets, on which the loss must not depend."""

from pathlib import Path

import pytest

from tests.distributed.small_runs import losses, metrics, run, same_weights, small_config, stop_after

CHAT = {
    "data__messages_column": "messages",
    "data__chat_template": str(Path(__file__).resolve().parents[2] / "configs" / "plain_chat.jinja"),
    "data__sequence_length": 96,
    "batch__global_batch_size": 4,
    "batch__micro_batch_size": 1,
}


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [({}, 2), ({"data__document_mask": True}, 4), ({"data__packing": False}, 2)],
    ids=["packed", "kept apart", "one per sequence"],
)
def test_conversations_have_one_loss_curve_on_one_rank_and_on_several(conversations, tmp_path, changes, world_size):
    alone, config = (small_config(conversations, tmp_path / name, **CHAT, **changes) for name in ("alone", "together"))
    assert run(alone, 1) == [0]
    assert run(config, world_size) == [0] * world_size
    assert [line["tokens"] for line in metrics(config)] == [line["tokens"] for line in metrics(alone)]
    curve = losses(alone)
    assert losses(config) == pytest.approx(curve, abs=2e-5)
    assert curve[-1] < curve[0] - 0.3


def test_masked_conversations_in_a_sequence_have_the_validation_loss_of_one_per_sequence(conversations, tmp_path):
    found = []
    for changes in ({"data__document_mask": True}, {"data__packing": False}, {}):
        # A learning rate of almost nothing: equal weights.
        changes = CHAT | changes | {"optim__learning_rate": 1e-30, "optim__weight_decay": 0.0, "train__max_steps": 1}
        config = small_config(conversations, tmp_path / str(len(found)), **changes, data__validation_fraction=0.5)
        assert run(config, 1) == [0]
        [line] = metrics(config, "validation")
        found.append((line["loss"], line["tokens"]))
    (apart, tokens), (separate, separate_tokens), (together, together_tokens) = found
    assert tokens == separate_tokens == together_tokens
    assert apart == pytest.approx(separate, abs=1e-6)
    assert together != pytest.approx(separate, abs=1e-5)


def test_a_run_on_conversations_that_is_stopped_and_continued_is_bitwise_the_undisturbed_one(conversations, tmp_path, capfd):
    found_by_their_column = CHAT | {"data__messages_column": None, "data__document_mask": True}
    runs = [small_config(conversations, tmp_path / name, **found_by_their_column) for name in ("one", "other")]
    assert run(runs[0], 2) == [0, 0]
    assert "dist_trainer.generate" in (told := capfd.readouterr().err)
    assert " --chat " in told, "who trained on conversations is told how to chat"
    run(runs[1], 2, before=stop_after(5, rank=1))
    assert run(runs[1], 2) == [0, 0]
    assert losses(runs[1]) == losses(runs[0])
    assert losses(runs[1], "validation") == losses(runs[0], "validation")
    assert same_weights(*runs)
