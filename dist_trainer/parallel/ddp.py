"""Distributed data parallelism: every rank holds the whole model and averages its gradients with the others'."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_trainer.distributed.world import World


def ddp(model: nn.Module, world: World) -> nn.Module:
    """`model` in torch's DistributedDataParallel; its weights become rank 0's. One process has no one to average with."""
    if world.world_size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
