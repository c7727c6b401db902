"""The rows of the tables of variants, by name: a config is checked without importing the tables, which import torch.

A test holds them equal to the tables.
"""

from __future__ import annotations

ROW_NAMES: dict[str, tuple[str, ...]] = {
    "model.name": ("decoder_lm", "hf"),
    "optim.name": ("auto", "adamw", "muon"),
    "schedule.name": ("cosine", "linear", "constant", "wsd"),
    "distributed.strategy": ("auto", "single", "ddp"),
}
"""By config key. `auto` is no row: it chooses among them."""
