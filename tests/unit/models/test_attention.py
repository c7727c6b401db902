"""A sequence of several documents with a document mask gives the same as one sequence per document."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_trainer.config.schema import ModelConfig
from dist_trainer.data.batch import IGNORED_TARGET, Batch
from dist_trainer.data.packing import DocumentDataset, PackedDataset, PaddingCollator, TokenStream
from dist_trainer.data.token_store import TokenStore
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.errors import ConfigError
from dist_trainer.models import attention as attention_module
from dist_trainer.models import decoder_lm
from dist_trainer.models.attention import attention, block_mask, dense_document_mask
from dist_trainer.models.decoder_lm import DecoderLM, KeyValueCache
from dist_trainer.models.loss import cross_entropy_sum, model_loss
from dist_trainer.parallel.compile import compile_model

VOCABULARY = 4096
GROUPED = ModelConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MULTI_HEAD = replace(GROUPED, num_key_value_heads=4)
DOCUMENT_LENGTHS = (5, 12, 1, 9, 7, 30)
ROW = 64


def build(config: ModelConfig = GROUPED) -> DecoderLM:
    with torch.device("meta"):
        model = DecoderLM(config, VOCABULARY, 256)
    model.to_empty(device="cpu").init_weights(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5 if parameter.dim() > 1 else 1  # attention that is far from even, so that one token too many shows
    return model


def store() -> tuple[TokenStore, np.ndarray]:
    offsets = np.cumsum([0, *DOCUMENT_LENGTHS])
    ids = np.random.default_rng(0).integers(5, VOCABULARY, offsets[-1], dtype=np.uint16)
    return TokenStore(ids, offsets, "key"), np.stack([offsets[:-1], offsets[1:]], axis=1)


def packed(*, document_mask: bool = True) -> Batch:
    """One row of all documents."""
    tokens, spans = store()
    rows = PackedDataset(TokenStream(tokens, spans), ROW, padding=0, fingerprint="", document_mask=document_mask)
    assert len(rows) == 1
    return rows[0]


def separate() -> Batch:
    """One sequence per document; a document of a single token has no target."""
    rows = DocumentDataset(*store(), ROW)
    return PaddingCollator(load_tokenizer("austen"))([rows[index] for index in range(len(rows))])


def logits_of_each(model: DecoderLM, batch: Batch) -> list[Tensor]:
    """Logits in the packed row, document by document, at the positions that have a token."""
    logits = model(batch.input_ids, document_ids=batch.document_ids)[0]
    ends = np.cumsum(DOCUMENT_LENGTHS)
    return [logits[end - length : min(end, ROW)] for end, length in zip(ends, DOCUMENT_LENGTHS, strict=True)]


@pytest.mark.parametrize("config", [GROUPED, MULTI_HEAD], ids=["grouped", "multi-head"])
def test_each_document_has_the_logits_that_it_has_alone(config):
    model, (tokens, spans) = build(config), store()
    for found, (start, end) in zip(logits_of_each(model, packed()), spans, strict=True):
        alone = model(torch.from_numpy(tokens.tokens[start:end].astype(np.int64))[None])[0]
        torch.testing.assert_close(found, alone[: len(found)], atol=1e-5, rtol=1e-5)


def test_without_the_mask_they_are_others():
    model = build()
    apart, together = logits_of_each(model, packed()), logits_of_each(model, packed(document_mask=False))
    torch.testing.assert_close(apart[0], together[0], atol=1e-5, rtol=1e-5)
    assert all((one - other).abs().max() > 0.01 for one, other in zip(apart[1:], together[1:], strict=True))


def test_loss_and_gradients_are_those_of_separate_sequences():
    found = []
    for batch in (packed(), separate()):
        model = build()
        loss = model_loss(model, batch)
        loss.backward()
        found.append((batch.num_targets(), loss, [parameter.grad for parameter in model.parameters()]))
    (targets, loss, gradients), (expected_targets, expected_loss, expected_gradients) = found
    assert targets == expected_targets == sum(DOCUMENT_LENGTHS) - len(DOCUMENT_LENGTHS)
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)


def test_without_documents_attention_is_torchs_own_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 40, 8, generator=generator) for heads in (4, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(attention(q, k, v, None, causal=True, dropout=0.0), expected)


def documents_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) for lengths in rows]).int()


# More than one block of FlexAttention's 128, and not a multiple of it.
LONG = [[3, 150, 47], [200], [130, 70]]


@torch.no_grad()
def test_flex_attention_sees_what_the_exact_mask_sees(monkeypatch):
    model, documents = build(), documents_of(LONG)
    tokens = torch.randint(0, VOCABULARY, documents.shape, generator=torch.Generator().manual_seed(1))
    expected = model(tokens, document_ids=documents)
    asked = []
    monkeypatch.setattr(decoder_lm, "document_mask", lambda given, **named: asked.append(named) or block_mask(given))
    with pytest.warns(UserWarning, match="without torch.compile"):
        found = model(tokens, document_ids=documents)
    assert asked == [{"head_size": 8, "drops_out": False, "dtype": torch.float32}]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("device", "missing", "head_size", "drops_out", "expected"),
    [
        ("cuda", None, 16, False, "blocks"),
        ("cuda", None, 96, False, "blocks"),
        ("cuda", None, 8, False, "exact"),
        ("cuda", None, 64, True, "exact"),
        ("cuda", "a C compiler", 64, False, "exact"),
        ("cpu", None, 64, False, "exact"),
    ],
)
def test_flex_attention_is_used_if_possible(monkeypatch, device, missing, head_size, drops_out, expected):
    monkeypatch.setattr(attention_module, "missing_compiler", lambda _: missing)
    monkeypatch.setattr(attention_module, "block_mask", lambda _: "blocks")
    monkeypatch.setattr(attention_module, "dense_document_mask", lambda *_: "exact")
    documents = SimpleNamespace(device=torch.device(device))
    found = attention_module.document_mask(documents, head_size=head_size, drops_out=drops_out, dtype=torch.float32)
    assert found == expected


def test_the_exact_mask_is_causal_within_documents():
    mask = dense_document_mask(documents_of([[2, 1], [3]]), torch.float16)
    assert mask.dtype == torch.float16
    assert ((mask == 0) | (mask == -torch.inf)).all()
    assert (mask == 0)[:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_mask_is_made_once_for_all_layers_and_changes_no_bit(dtype, monkeypatch):
    batch, masks, found = packed(), [], []
    own = F.scaled_dot_product_attention

    def with_numbers(*inputs, attn_mask, **named):
        masks.append(attn_mask)
        return own(*inputs, attn_mask=attn_mask, **named)

    def with_bool(*inputs, attn_mask, **named):
        return own(*inputs, attn_mask=attn_mask == 0, **named)

    for function in (with_numbers, with_bool):
        monkeypatch.setattr(F, "scaled_dot_product_attention", function)
        model = build()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model_loss(model, batch)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(mask.dtype == dtype for mask in masks)
    assert len({id(mask) for mask in masks}) == 1
    assert len(masks) == GROUPED.num_hidden_layers
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("device", "major", "hip", "dtype", "head_size", "masked", "expected"),
    [
        ("cpu", None, None, torch.float32, 64, True, True),
        ("cuda", 9, None, torch.bfloat16, 128, False, True),
        ("cuda", 8, None, torch.float16, 256, False, True),
        ("cuda", 8, None, torch.float16, 264, False, False),
        ("cuda", 7, None, torch.float16, 64, False, False),
        ("cuda", 9, None, torch.float32, 64, False, False),
        ("cuda", 9, None, torch.bfloat16, 64, True, False),
        ("cuda", 9, "6.4", torch.bfloat16, 64, False, False),
    ],
    ids=["a CPU", "H100", "A100", "a large head", "T4 or V100", "float32", "a mask", "ROCm"],
)
def test_groups_are_left_to_torch_if_a_kernel_takes_them(monkeypatch, device, major, hip, dtype, head_size, masked, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.version, "hip", hip)
    q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 8, head_size))
    assert attention_module.takes_groups(q, torch.zeros(1) if masked else None) == expected


def as_a_gpu_without_flash(q, k, v, *, attn_mask, dropout_p, is_causal, enable_gqa):
    """torch's own choice there: groups go to the kernel that writes out all scores, equal heads to the efficient one."""
    if enable_gqa:
        with sdpa_kernel(SDPBackend.MATH):
            named = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
            return F.scaled_dot_product_attention(q, k, v, **named, enable_gqa=True)
    mask = None if attn_mask is None else attn_mask.expand(-1, q.shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, dropout_p, is_causal)[0]


def kept_for_backward(length: int, *, masked: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers that attention of `length` tokens keeps, not counting the mask, which all layers share."""
    with torch.device("meta"):
        q, k, v = (torch.empty(2, heads, length, 16, dtype=torch.float16, requires_grad=True) for heads in (4, 2, 2))
        mask = dense_document_mask(torch.empty(2, length, dtype=torch.int32), torch.float16) if masked else None
    kept = []
    with monkeypatch.context() as other, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        other.setattr(attention_module, "F", SimpleNamespace(scaled_dot_product_attention=as_a_gpu_without_flash))
        attention(q, k, v, mask, causal=not masked, dropout=0.0)
    return sum(x.numel() for x in kept if mask is None or x.untyped_storage()._cdata != mask.untyped_storage()._cdata)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "exact document mask"])
def test_without_flash_memory_of_grouped_attention_grows_with_the_length_alone(monkeypatch, masked):
    monkeypatch.setattr(attention_module, "takes_groups", lambda *_: False)
    short, long = (kept_for_backward(length, masked=masked, monkeypatch=monkeypatch) for length in (128, 1024))
    assert long < 8.1 * short
    monkeypatch.setattr(attention_module, "takes_groups", lambda *_: True)
    short, long = (kept_for_backward(length, masked=masked, monkeypatch=monkeypatch) for length in (128, 1024))
    assert long > 30 * short, "what the kernel that takes groups would keep"


def test_repeated_keys_and_values_give_the_same_outputs_and_gradients(monkeypatch):
    found = []
    for repeated in (False, True):
        monkeypatch.setattr(attention_module, "takes_groups", lambda *_, takes=not repeated: takes)
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(2, heads, 40, 8, generator=generator, requires_grad=True) for heads in (6, 2, 2)]
        y = attention(*inputs, None, causal=True, dropout=0.0)
        found.append([y, *torch.autograd.grad(y.pow(2).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_cache_and_documents_do_not_go_together():
    batch = packed()
    with pytest.raises(ValueError, match="not both"):
        build()(batch.input_ids, document_ids=batch.document_ids, cache=KeyValueCache(2))


class Bare(torch.nn.Module):
    """A model of one's own that knows nothing of documents."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


class Before(Bare):
    """A model written for the parameter's earlier name."""

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        return self.inner(tokens, document_ids=documents)


class Knowing(Bare):
    """One that gives logits, and keeps documents apart."""

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self.inner(input_ids, document_ids=document_ids)


def test_a_model_gets_the_documents_if_it_takes_them_and_is_rejected_if_it_does_not():
    batch = packed()
    logits = build()(batch.input_ids, document_ids=batch.document_ids)
    torch.testing.assert_close(model_loss(Knowing(), batch), cross_entropy_sum(logits, batch.targets))
    with pytest.raises(ConfigError, match=r"data\.document_mask.*Bare takes no `document_ids`"):
        model_loss(Bare(), batch)
    with pytest.raises(ConfigError, match=r"the forward of Before takes `documents`; rename the parameter to `document_ids`"):
        model_loss(Before(), batch)
    assert model_loss(Bare(), replace(batch, document_ids=None)).isfinite()
    assert (batch.targets == IGNORED_TARGET).any()


@pytest.mark.parametrize("make", [lambda given: dense_document_mask(given, torch.float32), block_mask], ids=["exact", "blocks"])
@torch.no_grad()
def test_a_block_compiles_to_one_graph_with_either_mask_and_is_not_recompiled_for_other_documents(monkeypatch, make):
    model, compiled, graphs = build(), build(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for block in compiled.layers:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    tokens = torch.randint(0, VOCABULARY, (3, 200), generator=torch.Generator().manual_seed(1))
    for lengths in (LONG, [[100, 100], [199, 1], [20, 30, 150]]):
        documents = documents_of(lengths)
        expected = model(tokens, document_ids=documents)
        with monkeypatch.context() as other:
            other.setattr(decoder_lm, "document_mask", lambda given, **_: make(given))
            torch.testing.assert_close(compiled(tokens, document_ids=documents), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_compiled_either_mask_gives_the_same_logits(monkeypatch):
    model, compiled, documents = build(), build(), documents_of(LONG)
    compile_model(compiled)
    tokens = torch.randint(0, VOCABULARY, documents.shape, generator=torch.Generator().manual_seed(1))
    expected = model(tokens, document_ids=documents)
    torch.testing.assert_close(compiled(tokens, document_ids=documents), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(decoder_lm, "document_mask", lambda given, **_: block_mask(given))
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, document_ids=documents), expected, atol=1e-5, rtol=1e-5)
