"""`TrainingConfig` and its sections: every key with its type, default and description. Imports no torch.

`--help` and docs/configuration.md show the text under each key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from dist_trainer.config.paths import user_path

DEFAULT_MAX_STEPS = 300
MICRO_BATCHES = 8
"""Of a global batch, if batch.micro_batch_size is null: fewer if 8 do not divide it, more if there are more ranks."""


@dataclass(frozen=True)
class ModelConfig:
    """The model, with the names of Hugging Face's LlamaConfig. With init_from, keys that are not set come from that model."""

    name: str = "decoder_lm"
    """decoder_lm, a Llama; hf, any causal language model of transformers, named by init_from, whose config.json determines its
    shape; or "package.module:function" for a model of your own."""
    hidden_size: int = 192
    """Width of the residual stream."""
    intermediate_size: int = 512
    """Width inside the SwiGLU feed-forward."""
    num_hidden_layers: int = 4
    """Number of decoder blocks."""
    num_attention_heads: int = 6
    """Number of query heads; must divide hidden_size."""
    num_key_value_heads: int = 3
    """Number of key and value heads (grouped-query attention); must divide num_attention_heads."""
    head_dim: int | None = None
    """Size of each head, an even number; null: hidden_size / num_attention_heads."""
    attention_bias: bool = False
    """Whether the four attention projections have a bias."""
    mlp_bias: bool = False
    """Whether the three feed-forward projections have a bias."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm for numerical stability."""
    rope_theta: float = 10000.0
    """Base of the wavelengths of rotary position embeddings."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """RoPE scaling: default (none), linear, or llama3 (only long wavelengths)."""
    rope_factor: float = 8.0
    """linear, llama3: scaling factor."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths longer than rope_original_max_position_embeddings / this value are scaled in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than rope_original_max_position_embeddings / this value are not scaled; must be more than
    rope_low_freq_factor."""
    rope_original_max_position_embeddings: int = 8192
    """llama3: context length in tokens before scaling."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the embedding matrix."""
    dropout: float = 0.0
    """Dropout probability after embedding, attention and feed-forward, in training."""
    init_from: str | None = None
    """Model to start from: a run, a checkpoint, a Hugging Face model folder, or a name on the Hub; its tokenizer is used unless
    data.tokenizer is set (docs/fine_tuning.md). null: random initialisation."""

    @property
    def head_size(self) -> int:
        """Size of each head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    """Which data to read and how to turn it into token sequences."""

    dataset: str = "austen"
    """`austen` (built in), a name on the Hub, or a path: text, JSONL, CSV (also .gz, .xz, .bz2, .zst), Parquet, a save_to_disk
    folder or a folder in Hub layout."""
    dataset_config: str | None = None
    """Configuration of a dataset on the Hub or in Hub layout, such as plain_text for squad; null if the dataset has only
    one."""
    text_column: str = "text"
    """Column with the text."""
    template: str | None = None
    """Template of the text from several columns, such as "{context}\\n{question}"; replaces text_column. On the command line
    \\n is a newline and \\t a tab. `alpaca`: Stanford Alpaca's prompt from the columns instruction and input, with output as
    the completion."""
    completion_template: str | None = None
    """Template of the completion; only these tokens are trained on, with the end-of-text token after them. An example is
    " {answer}"; the text before it is the prompt. null: the complete text is trained on."""
    messages_column: str | None = None
    """Column with conversations, lists of {"role": ..., "content": ...}; they are rendered by the chat template, and only the
    assistant's messages are trained on. Replaces text_column; null: a column named messages or conversations, if there is no
    column text."""
    chat_template: str | None = None
    """File with the Jinja template that renders conversations; it is saved with each checkpoint's tokenizer. null: the
    tokenizer's own."""
    bad_records: int | Literal["stop"] = "stop"
    """What to do with invalid records (broken JSON, a missing column, a malformed conversation): stop, or skip up to this many
    per dataset; the log names each by file and line."""
    tokenizer: str = "austen"
    """`austen` (built in), a name on the Hub, or a path."""
    sequence_length: int = 256
    """Tokens per sequence."""
    packing: bool = True
    """Concatenate documents into full sequences; false: one document per sequence, padded (padding is not trained on)."""
    document_mask: bool = False
    """Separate the documents of a packed sequence: no attention across documents, and no loss on predicting the next document's
    first token. Has no effect without packing."""
    validation_dataset: str | None = None
    """Dataset to validate on, given like data.dataset: its validation split, or all of it if it has none. null: data.dataset's
    validation split, else part of the training documents."""
    validation_split: str | None = None
    """Split to validate on, such as test; null: the validation split."""
    validation_fraction: float = 0.05
    """Fraction of the documents held out for validation if there is no validation split; 0: no validation."""
    num_workers: int = 0
    """Data loading worker processes per rank; rarely needed, as tokens are memory-mapped."""
    cache_dir: str | None = None
    """Folder of the token stores; null: DIST_TRAINER_CACHE, else dist_trainer/ in the user's cache folder."""


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes; the number of accumulation steps is global_batch_size / (micro_batch_size x ranks)."""

    global_batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of one rank; global_batch_size must be a multiple of this times the number of ranks. Losses
    and weights have the same bits on any number of ranks, but not with another micro_batch_size. null: an eighth of the global
    batch, on 1, 2, 4 or 8 ranks; else global batch / ranks."""

    def sequences_per_micro_batch(self, ranks: int) -> int:
        """`micro_batch_size`, or what null means on `ranks` ranks: it depends on them only if they do not divide MICRO_BATCHES,
        or the largest power of two that divides both this and the global batch.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        parts = math.gcd(self.global_batch_size, MICRO_BATCHES)
        return self.global_batch_size // (parts if parts % ranks == 0 else ranks)

    def ranks_with_same_micro_batches(self, ranks: int) -> list[int]:
        """The numbers of ranks that share out the same micro-batches as `ranks` do, in rising order."""
        sequences = self.sequences_per_micro_batch(ranks)
        parts = self.global_batch_size // sequences
        divisors = (number for number in range(1, parts + 1) if parts % number == 0)
        return [number for number in divisors if self.sequences_per_micro_batch(number) == sequences]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    name: str = "auto"
    """adamw; muon, with AdamW for everything but the hidden matrices; or "package.module:function". auto: muon for a decoder_lm
    with random weights and at least 16 x hidden_size tokens per step, else adamw."""
    learning_rate: float = 5e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for the running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of AdamW's update."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and other vectors are not decayed."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm, for clipping; 0: no clipping."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: str = "cosine"
    """cosine, linear, constant, wsd (constant, then decay at the end), or "package.module:function"."""
    warmup_steps: int = 40
    """Steps of linear warmup: step s has s / warmup_steps of the peak learning rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, which ends at max_steps or epochs, whichever comes first, and what happens around its steps."""

    max_steps: int | None = None
    """Optimizer steps; null: as many as train.epochs needs, or 300 if that is null too."""
    epochs: float | None = None
    """Passes over the training data; null: limited only by max_steps."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """What to do on a NaN/Inf loss or gradient: stop the run (exit code 3), or skip the update. fp16 always skips."""
    max_skipped_steps: int = 20
    """Consecutive skipped updates after which the run stops anyway."""
    callbacks: tuple[str, ...] = ()
    """Callbacks of your own, such as early stopping: functions as package.module:function, called in this order."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and compilation."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the forward and backward pass; auto: bf16 if the GPU supports it, else fp16 on GPUs, fp32 on CPU."""
    tf32: bool = False
    """Let GPUs use TF32 (10-bit mantissa) for fp32 matrix multiplications: several times faster, less precise."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile; auto: if the run is long enough (a few minutes on a GPU, a quarter of an hour on a CPU) and
    the machine has the compilers for it."""


@dataclass(frozen=True)
class ValidationConfig:
    """When and on how much data to validate. There is always a validation at the end."""

    every_steps: int = 100
    """Steps between validations; 0: only every_epochs and at the end."""
    every_epochs: float = 0.0
    """Passes over the training data between validations; 0: only every_steps and at the end."""
    max_global_batches: int | None = None
    """Validate on this many global batches only, each of batch.global_batch_size sequences over all ranks; null: on every
    validation sequence once."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, how many to keep, and what to resume from."""

    every_steps: int = 100
    """Steps between checkpoints; 0: only after a validation with the lowest loss so far, at the end, and on a signal to
    stop."""
    keep_last: int = 2
    """How many recent checkpoints to keep, in addition to the best."""
    max_failures: int = 5
    """Consecutive failed saves (full disk, NaN/Inf weights) after which the run stops."""
    resume: str = "auto"
    """auto: resume from the newest valid checkpoint in the run's folder; never: move the earlier run aside and start over; or
    the folder of another run or a checkpoint to continue from."""


@dataclass(frozen=True)
class TrackingConfig:
    """What to log, and where."""

    log_every_steps: int = 10
    """Steps between training metrics in metrics.jsonl, in the log file, and on a console that is not a terminal."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: files in the run's folder (offline), its server (online), or neither (disabled). WANDB_MODE, if set,
    overrides it."""
    wandb_project: str | None = None
    """Project in W&B and trackio; null: WANDB_PROJECT, else dist_trainer."""
    wandb_entity: str | None = None
    """W&B team or user; null: WANDB_ENTITY, else the account's default."""
    wandb_group: str | None = None
    """Group of the run in W&B and trackio; null: WANDB_RUN_GROUP, else none."""
    wandb_tags: str | None = None
    """Tags of the run in W&B, separated by commas; null: WANDB_TAGS, else none."""
    wandb_code: bool = False
    """Save this package's Python files to W&B; otherwise only the commit and whether there were changes."""
    tensorboard: bool = False
    """Write TensorBoard event files to tensorboard/ in the run's folder; needs the package tensorboard."""
    trackio: bool = False
    """Log to a trackio dashboard, local or in the Space of TRACKIO_SPACE_ID; needs the package trackio."""
    sample_every_steps: int | None = None
    """Steps between text samples (one is always taken at the end); null: after each validation; 0: none."""
    sample_prompt: str | None = None
    """Prompt of the text samples, or, if data.messages_column is set, a JSON list of messages to answer; null: the first words
    of a validation document, or what precedes its first answer; "": no samples."""
    sample_tokens: int = 96
    """Tokens per text sample; 0: no samples."""
    digest_every_steps: int = 100
    """Steps between digests of the weights in metrics.jsonl (one is always taken at the end), by which runs can be compared;
    0: only those of checkpoints, in manifest.json and status.json."""


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of single steps; see docs/performance.md."""

    steps: str | None = None
    """Steps to profile, such as 5-8 or 5; each rank's trace is written to profile/ in the run's folder. null: none."""


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks work together."""

    strategy: str = "auto"
    """single, ddp, or "package.module:function"; auto: ddp with several ranks, else single."""
    reduction: str = "exact"
    """exact: the gradients of micro-batches are added in one order, so that losses and weights have the same bits on any number
    of ranks; fast: in the order of torch's all-reduce, which depends on the number of ranks; or "package.module:function". A
    strategy of your own sums as it likes, as fast does."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of torch.distributed; auto: nccl on GPUs, gloo on CPU."""
    hang_timeout_minutes: float | None = None
    """Minutes without a sign of life, or without progress while other ranks wait, after which a rank is considered hung and the
    run aborts; null: 10 until the first step is done (compilation, loading), then 2. Each micro-batch, each batch that is read
    and each validation batch counts as progress; the limit is never less than ten times the longest step so far. Preparing data
    and saving may take longer."""
    sentinel_every_steps: int = 0
    """Every so many steps a second rank computes one micro-batch as well, and all ranks compare their weights and optimizer
    state, to the last bit; 0: never. Needs two ranks and distributed.reduction exact."""
    on_disagreement: Literal["stop", "redo"] = "stop"
    """What to do if the two computations differ: stop the run (exit code 3), or redo the step, and stop if it happens again.
    Different weights or optimizer state always stop it."""


@dataclass(frozen=True)
class TrainingConfig:
    """All settings of a run. The run's folder is output_dir/run_name."""

    run_name: str = "default"
    """Name of the run and its folder."""
    output_dir: str = "runs"
    """Folder that contains the runs' folders."""
    seed: int = 0
    """Seed for initialisation, data order and dropout."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def run_folder(self) -> Path:
        """The run's folder; `~` in output_dir is the home folder."""
        return user_path(self.output_dir) / self.run_name


LLAMA, TRANSFORMERS = "decoder_lm", "hf"
"""Values of model.name: DecoderLM, a Llama; and any causal language model of transformers."""
SHAPE_FIELDS = tuple(field.name for field in fields(ModelConfig) if field.name not in ("name", "init_from", "dropout"))
"""Keys of the model section that a model's config.json determines."""
