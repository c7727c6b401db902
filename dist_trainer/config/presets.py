"""`--preset`: model sizes with matching learning rate and batch size.

The source of each number:

GPT-3     Brown et al. 2020, arXiv:2005.14165, table 2.1 (layers, width, heads, batch in tokens, learning rate) and appendix B
          (linear warmup over the first 375 million tokens, cosine decay to a tenth, betas 0.9 and 0.95, weight decay 0.1,
          gradient norm 1: the last five are this trainer's defaults).
DeepSeek  Bi et al. 2024, arXiv:2401.02954, section 3.1: of a budget of C floating-point operations, the best learning rate is
          0.3118 C^-0.1250 and the best batch 0.2920 C^0.3271 tokens. C is here 6 N D with D = 20 N tokens (Hoffmann et al.
          2022, arXiv:2203.15556) for N parameters outside the embedding. Fitted to C from 1e17 to 2e19; below, extrapolated.
Llama     Touvron et al. 2023, arXiv:2302.13971, section 2.2: the SwiGLU's width is 2/3 of 4 times the model's, here rounded
          up to a multiple of 256 as in its code (8 for `1m`).
nanoGPT   github.com/karpathy/nanoGPT, config/train_shakespeare_char.py: 6 layers of 384 with 6 heads, 100 steps of warmup.
llama2.c  github.com/karpathy/llama2.c, README, its 42M model: 8 layers of 512 with 8 heads.
Pythia    Biderman et al. 2023, arXiv:2304.01373, table 1 and appendix E: 1.0B has learning rate 3e-4, 2M tokens a step, warmup
          over 1% of 143,000 steps.
Llama 3.2 the config.json of meta-llama/Llama-3.2-1B.

The learning rates were found for AdamW. Muon's updates, scaled as in optim/muon.py, suit them too (Liu et al. 2025,
arXiv:2502.16982).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_trainer.config.schema import BatchConfig, DataConfig


@dataclass(frozen=True)
class Preset:
    """A size of DecoderLM, and how it is trained from scratch."""

    model: Mapping[str, int | float]
    """Keys of the model section."""
    parameters: int
    """Outside the embedding, which adds vocabulary x hidden_size (tied: the output head is the same matrix)."""
    learning_rate: float
    batch_tokens: int
    """A power of two."""
    warmup_steps: int
    micro_batch_tokens: int | None = None
    """The maximum number of tokens in one forward pass; None: as for batch.micro_batch_size: null.

    For a GPU with 24 GB (1b: 40 GB) in bf16, assuming 16 bytes per parameter (weights, gradients, AdamW; Muon takes less) and
    34 x hidden_size bytes per token and layer (Korthikanti et al. 2022, arXiv:2205.05198, equation 2 without the attention
    matrices, which fused kernels do not store); logits exist only in chunks. An estimate: --dry_run measures.
    """


def _shape(
    hidden: int, feed_forward: int, layers: int, heads: int, groups: int | None = None, **others: float
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
        **others,
    }


PRESETS: dict[str, Preset] = {
    # Shape: our own, about a million. DeepSeek: C = 1.2e14, so 5.4e-3 and 11.7k tokens. Warmup: nanoGPT.
    "1m": Preset(_shape(128, 344, 5, 4), 989_568, 5.4e-3, 2**14, 100),
    # Shape and warmup: nanoGPT, with Llama's feed-forward. DeepSeek: C = 1.4e16, so 3.0e-3 and 55k tokens.
    "10m": Preset(_shape(384, 1024, 6, 6), 10_621_824, 3.0e-3, 2**16, 100, 2**15),
    # Shape: llama2.c, with Llama's feed-forward. DeepSeek: C = 8.9e16, so 2.4e-3 and 102k tokens. Warmup: nanoGPT.
    "30m": Preset(_shape(512, 1536, 8, 8), 27_271_680, 2.4e-3, 2**17, 100, 2**15),
    # GPT-3 Small: 6.0e-4, 0.5M tokens, 375M tokens of warmup. With GPT-2's 50,257 tokens it has 124M parameters.
    "124m": Preset(_shape(768, 2048, 12, 12), 84_953_856, 6.0e-4, 2**19, 715, 2**15),
    # GPT-3 Medium: 3.0e-4, 0.5M tokens, 375M tokens of warmup.
    "350m": Preset(_shape(1024, 2816, 24, 16), 308_331_520, 3.0e-4, 2**19, 715, 2**14),
    # Shape: Llama 3.2 1B. Pythia 1.0B: 3.0e-4, 2M tokens, 1430 steps of warmup.
    "1b": Preset(_shape(2048, 8192, 16, 32, 8, rope_theta=500_000.0), 973_146_112, 3.0e-4, 2**21, 1430, 2**13),
}


def format_presets() -> str:
    """A table of the presets."""
    rows = [("preset", "parameters", "layers x width", "learning rate", "tokens per step", "warmup steps")]
    for name, preset in PRESETS.items():
        shape = f"{preset.model['num_hidden_layers']} x {preset.model['hidden_size']}"
        millions = f"{preset.parameters / 1e6:.3g}M"
        rows.append((name, millions, shape, f"{preset.learning_rate:g}", str(preset.batch_tokens), str(preset.warmup_steps)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join([*lines, "Parameters exclude the embedding, which adds vocabulary x width.", ""])


def preset_keys(name: str, assigned: Mapping[str, Any], *, ranks: int = 1) -> dict[str, Any]:
    """The dotted keys that the preset `name` sets, given the values that the user has `assigned` to others.

    A step has the preset's number of tokens, rounded down to a power of two, whatever data.sequence_length is.
    """
    preset = PRESETS[name]
    length = assigned.get("data.sequence_length", DataConfig.sequence_length)
    keys: dict[str, Any] = {f"model.{key}": value for key, value in preset.model.items()}
    keys["batch.global_batch_size"] = sequences_of(preset.batch_tokens, length)
    if preset.micro_batch_tokens is not None:
        batch = BatchConfig(assigned.get("batch.global_batch_size", keys["batch.global_batch_size"]))
        at_most = sequences_of(preset.micro_batch_tokens, length)
        keys["batch.micro_batch_size"] = _micro_batch_size(batch, at_most, ranks)
    return keys | {"optim.learning_rate": preset.learning_rate, "schedule.warmup_steps": preset.warmup_steps}


def _micro_batch_size(batch: BatchConfig, at_most: int, ranks: int) -> int:
    """The largest size up to `at_most` that divides the default for one process: it is the same on as many numbers of ranks as
    possible. If `ranks` ranks cannot share these micro-batches evenly, the largest that divides their default.
    """
    size = 1
    for count in (1, ranks):
        share = batch.sequences_per_micro_batch(count)
        size = max((size for size in range(1, min(at_most, share) + 1) if share % size == 0), default=1)
        if batch.global_batch_size // size % ranks == 0:
            break
    return size


def sequences_of(tokens: int, sequence_length: int) -> int:
    """How many sequences `tokens` make: a power of two, so that ranks and accumulation steps divide it; at least one."""
    return 1 << max(0, (tokens // max(1, sequence_length)).bit_length() - 1)
