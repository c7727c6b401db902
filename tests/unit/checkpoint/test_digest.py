"""The digest of weights depends on their bits, names, formats and shapes, and on nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_trainer.checkpoint.digest import digest_of_folder, tensor_digests, weights_digest
from dist_trainer.checkpoint.host_copy import PinnedMemory, start_host_copy
from dist_trainer.config.schema import ModelConfig
from dist_trainer.errors import CheckpointError
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.weights import make_weight_namer, make_weight_saver


def weights() -> dict[str, torch.Tensor]:
    """Of all kinds that files have: bf16, a scalar, whole numbers, flags, nothing at all."""
    return {
        "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
        "half": torch.linspace(-1, 1, 5).bfloat16(),
        "scale": torch.tensor(0.5),
        "steps": torch.tensor([1, 2], dtype=torch.int64),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def test_it_can_be_computed_without_torch():
    own = {
        name: hashlib.blake2b(header.encode() + values.numpy().tobytes(), digest_size=32).hexdigest()
        for name, header, values in [
            ("b", "float32 [3, 4]\n", weights()["matrix"]),
            ("a", "bfloat16 [5]\n", weights()["half"].view(torch.uint8)),
        ]
    }
    text = json.dumps(own, sort_keys=True).encode()
    given = [("b", weights()["matrix"]), ("a", weights()["half"])]
    assert weights_digest(given) == hashlib.blake2b(text, digest_size=32).hexdigest()
    assert tensor_digests(given) == own


def test_neither_order_nor_layout_nor_gradients_matter():
    expected = weights_digest(weights().items())
    assert weights_digest(reversed(weights().items())) == expected
    columns = weights()["matrix"].t().contiguous().t()
    assert not columns.is_contiguous()
    assert weights_digest({**weights(), "matrix": columns.requires_grad_()}.items()) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"matrix": weights()["matrix"].nextafter(torch.tensor(99.0))},
        {"matrix": weights()["matrix"].view(4, 3)},
        {"matrix": weights()["matrix"].view(torch.int32)},
        {"half": weights()["half"].half()},
        {"scale": torch.tensor([0.5])},
        {"empty": torch.zeros(4, 0)},
        {"another": torch.tensor(0.5)},
    ],
    ids=["bits", "shape", "format", "format of half the size", "number of axes", "shape without elements", "one more"],
)
def test_any_difference_changes_it(changed):
    assert weights_digest({**weights(), **changed}.items()) != weights_digest(weights().items())
    before, after = tensor_digests(weights().items()), tensor_digests({**weights(), **changed}.items())
    assert [name for name in after if after[name] != before.get(name)] == list(changed)


def test_names_belong_to_their_tensors():
    one, two = torch.zeros(2), torch.ones(2)
    assert weights_digest([("a", one), ("b", two)]) != weights_digest([("a", two), ("b", one)])


def test_a_folder_has_the_digest_of_the_weights_in_it(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    assert digest_of_folder(tmp_path) == weights_digest(weights().items())


def test_shards_have_the_digest_of_one_file(tmp_path):
    names = sorted(weights())
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: weights()[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    files = {name: f"part-{0 if name in names[:3] else 1}.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert digest_of_folder(tmp_path) == weights_digest(weights().items())


def test_a_folder_without_weights_has_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        digest_of_folder(tmp_path)


class Own(nn.Module):
    """Two names for one matrix, a part of a larger buffer, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("part", torch.zeros(10)[:5])
        self.register_buffer("cache", torch.zeros(3), persistent=False)


def decoder(**changes: object) -> DecoderLM:
    shape = ModelConfig("decoder_lm", 16, 32, 2, num_attention_heads=2, num_key_value_heads=1)
    return DecoderLM(replace(shape, **changes), vocabulary_size=64, max_position_embeddings=8)


@pytest.mark.parametrize(
    "model",
    [Own(), decoder(tie_word_embeddings=True), decoder(tie_word_embeddings=False), decoder().bfloat16()],
    ids=["own", "tied", "untied", "bf16"],
)
def test_a_model_s_weights_have_the_digest_of_the_file_they_are_saved_in(model, tmp_path):
    copied = start_host_copy(model.state_dict(), pinned=PinnedMemory()).wait()
    make_weight_saver(model)(copied, tmp_path)
    assert weights_digest(make_weight_namer(model)(copied).items()) == digest_of_folder(tmp_path)
