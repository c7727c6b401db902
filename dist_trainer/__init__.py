"""Distributed training of decoder language models. Names resolve when first used, so that the import costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_trainer.version import __version__

if TYPE_CHECKING:
    from dist_trainer.checkpoint.manager import CheckpointManager
    from dist_trainer.config.schema import TrainingConfig
    from dist_trainer.data.batch import Batch
    from dist_trainer.data.loader import create_dataloaders
    from dist_trainer.data.tokenizers import load_tokenizer
    from dist_trainer.distributed.context import DistributedContext, init_distributed
    from dist_trainer.models.decoder_lm import DecoderLM
    from dist_trainer.models.weights import make_weight_saver
    from dist_trainer.optim.registry import build_optimizer
    from dist_trainer.parallel.registry import parallelize
    from dist_trainer.run.configure import load_config
    from dist_trainer.training.callbacks import Callback
    from dist_trainer.training.trainer import Trainer

_HOMES = {
    "Batch": "data.batch",
    "Callback": "training.callbacks",
    "CheckpointManager": "checkpoint.manager",
    "DecoderLM": "models.decoder_lm",
    "Trainer": "training.trainer",
    "TrainingConfig": "config.schema",
    "DistributedContext": "distributed.context",
    "build_optimizer": "optim.registry",
    "create_dataloaders": "data.loader",
    "init_distributed": "distributed.context",
    "load_config": "run.configure",
    "load_tokenizer": "data.tokenizers",
    "parallelize": "parallel.registry",
    "make_weight_saver": "models.weights",
}

__all__ = [
    "Batch",
    "Callback",
    "CheckpointManager",
    "DecoderLM",
    "DistributedContext",
    "Trainer",
    "TrainingConfig",
    "__version__",
    "build_optimizer",
    "create_dataloaders",
    "init_distributed",
    "load_config",
    "load_tokenizer",
    "make_weight_saver",
    "parallelize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
