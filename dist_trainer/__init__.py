"""Distributed training of decoder language models. Names resolve when first used, so that the import costs nothing."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_trainer.version import __version__

if TYPE_CHECKING:
    from dist_trainer.checkpoint.manager import CheckpointManager as CheckpointManager
    from dist_trainer.config.schema import TrainingConfig as TrainingConfig
    from dist_trainer.data.batch import Batch as Batch
    from dist_trainer.data.loader import create_dataloaders as create_dataloaders
    from dist_trainer.data.tokenizers import load_tokenizer as load_tokenizer
    from dist_trainer.distributed.context import DistributedContext as DistributedContext
    from dist_trainer.distributed.context import init_distributed as init_distributed
    from dist_trainer.models.decoder_lm import DecoderLM as DecoderLM
    from dist_trainer.models.weights import make_weight_saver as make_weight_saver
    from dist_trainer.optim.registry import build_optimizer as build_optimizer
    from dist_trainer.parallel.registry import parallelize as parallelize
    from dist_trainer.run.configure import load_config as load_config
    from dist_trainer.training.callbacks import Callback as Callback
    from dist_trainer.training.trainer import Trainer as Trainer

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

__all__ = ["__version__", *_HOMES]


_RENAMED = {"World": "DistributedContext and init_distributed", "weights_writer": "make_weight_saver"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise ImportError(f"{__name__}.{name} was renamed to {_RENAMED[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
