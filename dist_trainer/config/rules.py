"""Rules that a config must satisfy beyond the types of its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from dist_trainer.config.keys import key_types
from dist_trainer.config.paths import has_checkpoints, user_path
from dist_trainer.config.registry import ENTRY_NAMES, unknown_entry_message
from dist_trainer.config.schema import (
    TRANSFORMERS,
    BatchConfig,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    ProfileConfig,
    TrainingConfig,
)
from dist_trainer.config.values import ALPACA, parse_profile_steps, parse_template
from dist_trainer.errors import ConfigError

_OWN_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NOT_NEGATIVE = (
    "seed",
    "data.num_workers",
    "optim.weight_decay",
    "optim.max_grad_norm",
    "schedule.warmup_steps",
    "validation.every_steps",
    "validation.every_epochs",
    "checkpoint.every_steps",
    "tracking.sample_tokens",
    "tracking.sample_every_steps",
    "tracking.digest_every_steps",
    "distributed.sentinel_every_steps",
)
"""Numbers that may be 0."""
_FRACTIONS = ("model.dropout", "data.validation_fraction")
"""Numbers from 0 up to, but not including, 1."""


def check_config(config: TrainingConfig) -> None:
    """Raises ConfigError that lists every rule that `config` violates."""
    raise_problems(rule_violations(config))


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one ConfigError for all `problems`, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} problems in the config:\n{lines}")


def rule_violations(config: TrainingConfig, *, world_size: int | None = None) -> list[str]:
    """A sentence for each rule that `config` violates, starting with the key. `world_size`: the number of ranks, if known."""
    return [
        *_ranges(config),
        *_names(config),
        *_entries(config),
        *_model(config.model),
        *_data(config.data),
        *_batch(config.batch, world_size),
        *_profile(config.profile),
        *_distributed(config.distributed),
    ]


def _ranges(config: TrainingConfig) -> Iterator[str]:
    """Numbers that are not listed above must be more than 0, so that new keys are checked too."""
    for key in key_types():
        section, _, name = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or key == "schedule.min_lr_ratio":
            continue
        if key in _FRACTIONS:
            if not 0 <= value < 1:
                yield f"{key}: {value} must be 0 or more, and less than 1"
        elif key in _NOT_NEGATIVE:
            if not 0 <= value < math.inf:
                yield f"{key}: {value} must be 0 or more"
        elif not 0 < value < math.inf:
            yield f"{key}: {value} must be more than 0"
    if config.seed >= 1 << 63:
        yield f"seed: {config.seed} must be less than 2^63"
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas: {list(config.optim.betas)} must each be 0 or more, and less than 1"
    if not 0 <= config.schedule.min_lr_ratio <= 1:
        yield f"schedule.min_lr_ratio: {config.schedule.min_lr_ratio} must be from 0 to 1"


def _names(config: TrainingConfig) -> Iterator[str]:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*", config.run_name) or len(config.run_name) > 128:
        yield f"run_name: {config.run_name!r} must be a plain folder name (letters, digits and _ . + = @ -)"
    if not config.output_dir:
        yield "output_dir: must not be empty; use . for the current folder"
    resume = config.checkpoint.resume
    # A run with checkpoints resumes from these: the one that it started from may be gone.
    if resume not in ("auto", "never") and not user_path(resume).is_dir() and not has_checkpoints(config.run_folder):
        yield f"checkpoint.resume: {resume!r} is neither auto, never, nor an existing folder"


def _entries(config: TrainingConfig) -> Iterator[str]:
    """Names that are in no registry. A user's function may import torch, so run/build.py looks it up."""
    for key, names in ENTRY_NAMES.items():
        section, _, field = key.rpartition(".")
        name = getattr(getattr(config, section), field)
        if name in names:
            continue
        if ":" not in name:
            yield unknown_entry_message(names, name, key)
        elif not _OWN_FUNCTION.fullmatch(name):
            yield f"{key}: {name!r} is not of the form package.module:function"
    for name in config.train.callbacks:
        if not _OWN_FUNCTION.fullmatch(name):
            yield f"train.callbacks: {name!r} is not of the form package.module:function"


def _model(model: ModelConfig) -> Iterator[str]:
    if model.name == TRANSFORMERS:  # which ignores the other keys
        if model.init_from is None:
            yield "model.init_from: must name a folder with a config.json, or a model on the Hub, if model.name is hf"
        return
    if model.rope_type == "llama3" and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
        yield f"model.rope_high_freq_factor: {high} must be more than model.rope_low_freq_factor ({low})"
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads <= 0 or groups <= 0 or model.hidden_size <= 0:
        return
    if model.hidden_size % heads:
        yield f"model.num_attention_heads: model.hidden_size ({model.hidden_size}) is not divisible by {heads}"
    elif model.head_dim is not None and model.head_dim % 2:
        yield f"model.head_dim: {model.head_dim} must be even for rotary positions"
    elif model.head_size % 2:
        size = model.hidden_size // heads
        yield f"model.num_attention_heads: {heads} heads have {size} dimensions each; rotary positions need an even number"
    if heads % groups:
        yield f"model.num_key_value_heads: model.num_attention_heads ({heads}) is not divisible by {groups}"


def _data(data: DataConfig) -> Iterator[str]:
    for key in ("dataset", "tokenizer", "text_column"):
        if not getattr(data, key):
            yield f"data.{key}: must not be empty"
    for key in ("template", "completion_template"):
        template = getattr(data, key)
        if template is not None and (key, template) != ("template", ALPACA):
            try:
                parse_template(template, key=f"data.{key}")
            except ConfigError as error:
                yield str(error)
    for key in ("messages_column", "chat_template", "validation_split"):
        if getattr(data, key) == "":
            yield f"data.{key}: must not be empty; use null for none"
    texts = [key for key in ("template", "completion_template") if getattr(data, key) is not None]
    for key in ("messages_column", "chat_template"):
        if getattr(data, key) is not None and texts:
            yield (
                f"data.{key}: {getattr(data, key)!r} is set, and so is {' and '.join(f'data.{text}' for text in texts)}; "
                "records are either conversations or text: set one of the two to null"
            )


def _batch(batch: BatchConfig, world_size: int | None) -> Iterator[str]:
    ranks = world_size or 1
    if batch.global_batch_size <= 0:
        return
    if batch.micro_batch_size is None:
        if batch.global_batch_size % ranks:
            yield f"batch.global_batch_size: {batch.global_batch_size} must be a multiple of the number of ranks ({ranks})"
    elif batch.micro_batch_size > 0 and batch.global_batch_size % (batch.micro_batch_size * ranks):
        together = f"batch.micro_batch_size ({batch.micro_batch_size})"
        if world_size is not None:
            product = batch.micro_batch_size * ranks
            together += f" x ranks ({ranks}) = {product} sequences"
        yield f"batch.global_batch_size: {batch.global_batch_size} must be a multiple of {together}"


def _profile(profile: ProfileConfig) -> Iterator[str]:
    if profile.steps is not None:
        try:
            parse_profile_steps(profile.steps)
        except ConfigError as error:
            yield str(error)


def _distributed(distributed: DistributedConfig) -> Iterator[str]:
    if distributed.sentinel_every_steps > 0 and distributed.reduction != "exact":
        yield (
            f"distributed.sentinel_every_steps: {distributed.sentinel_every_steps} needs distributed.reduction exact, with "
            f"which two ranks compute the same bits; it is {distributed.reduction}"
        )
