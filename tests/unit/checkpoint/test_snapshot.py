"""A snapshot shares no memory with what training changes; the last one copies nothing. Older snapshots can still be read."""

from __future__ import annotations

import json

import torch
from torch import nn

from dist_trainer.checkpoint.state import (
    STATE_FILE,
    Progress,
    Snapshot,
    read_training_state,
    take_snapshot,
    write_training_state,
)


class Tied(nn.Module):
    """Two names for one matrix, a vector, and a part of a larger buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)
        self.head.weight = self.embedding.weight
        self.register_buffer("part", torch.zeros(10)[:5])


def snapshot(model: nn.Module, *, is_last: bool) -> Snapshot:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return take_snapshot(model, optimizer, scaler={}, progress=Progress(step=1), metadata={}, is_last=is_last)


def addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}


def test_while_training_continues_everything_is_a_copy():
    model = Tied()
    taken = snapshot(model, is_last=False)
    assert not {*addresses(taken.weights).values()} & {*addresses(model.state_dict()).values()}
    before = {name: tensor.clone() for name, tensor in taken.weights.items()}
    with torch.no_grad():
        model.embedding.weight.zero_()
    assert all(torch.equal(taken.weights[name], before[name]) for name in before)


def test_the_last_one_copies_only_what_could_not_be_written_as_it_is():
    model = Tied()
    taken = snapshot(model, is_last=True)
    own, theirs = addresses(taken.weights), addresses(model.state_dict())
    assert {name for name in own if own[name] != theirs[name]} == {"head.weight", "part"}
    assert len({*own.values()}) == len(own)
    assert all(torch.equal(taken.weights[name], tensor) for name, tensor in model.state_dict().items())
    assert taken.optimizer_tensors["embedding.weight::exp_avg"].abs().sum() > 0


def test_the_state_of_an_older_version_is_read_under_its_old_name(tmp_path):
    write_training_state(Snapshot({}, {}, {}, {}, Progress(step=6, pending_sample_step=6)), tmp_path)
    path = tmp_path / STATE_FILE
    state = json.loads(path.read_text())
    state["progress"]["owed_sample_step"] = state["progress"].pop("pending_sample_step")
    path.write_text(json.dumps(state))
    assert read_training_state(tmp_path)["progress"].has_pending_sample
