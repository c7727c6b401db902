"""torch's AdamW without its compiler."""

from __future__ import annotations

import torch

from dist_trainer.optim.uncompiled import EagerOptimizer, plain


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW to the last bit, for steps that are not themselves compiled."""

    step = torch.no_grad()(plain(torch.optim.Adam.step))

    def init_optimizer_state(self) -> None:
        """State as the first step would make it, for parameters that have none; where it is fused, without amsgrad."""
        if not self.defaults["fused"] or self.defaults["amsgrad"]:
            return
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter not in self.state:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
