"""torch's AdamW without its compiler."""

from __future__ import annotations

import torch

from dist_trainer.optim.uncompiled import Uncompiled, plain


class AdamW(Uncompiled, torch.optim.AdamW):
    """torch.optim.AdamW to the last bit, for steps that are not themselves compiled."""

    step = torch.no_grad()(plain(torch.optim.Adam.step))
