"""`TrainingConfig` and its sections: every key, its default, its meaning and unit. Imports no torch.

The sentence under a key is what `--help` and docs/configuration.md show.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from dist_trainer.config.paths import user_path

DEFAULT_MAX_STEPS = 300


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, in the words of Hugging Face's LlamaConfig. With init_from, keys not set are that model's."""

    name: str = "decoder_lm"
    """Row of the MODELS table (decoder_lm; hf, any causal language model of transformers, which init_from names and whose
    config.json says all about its shape), or "package.module:function" for a model of your own."""
    hidden_size: int = 192
    """Width of the residual stream."""
    intermediate_size: int = 512
    """Width inside the SwiGLU feed-forward."""
    num_hidden_layers: int = 4
    """Number of decoder blocks."""
    num_attention_heads: int = 6
    """Query heads; divides hidden_size."""
    num_key_value_heads: int = 3
    """Key and value heads (grouped-query attention); divides num_attention_heads."""
    head_dim: int | None = None
    """Dimensions of a head, an even number; null: hidden_size / num_attention_heads."""
    attention_bias: bool = False
    """Whether attention's four projections add a bias."""
    mlp_bias: bool = False
    """Whether the feed-forward's three projections add a bias."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """How rotary frequencies were stretched for a longer context: not; all alike; or long wavelengths alone (Llama 3.1)."""
    rope_factor: float = 8.0
    """By how much (linear, llama3)."""
    rope_low_freq_factor: float = 1.0
    """llama3: wavelengths above rope_original_max_position_embeddings / this are stretched in full."""
    rope_high_freq_factor: float = 4.0
    """llama3: wavelengths below rope_original_max_position_embeddings / this are left alone; more than rope_low_freq_factor."""
    rope_original_max_position_embeddings: int = 8192
    """llama3: tokens of the context before it was stretched."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as output head too."""
    dropout: float = 0.0
    """Probability of zeroing an element after embedding, attention and feed-forward, while training."""
    init_from: str | None = None
    """Model to start from: a run, a checkpoint, a Hugging Face model's folder, or a name on the Hub; its tokenizer is used,
    too, unless data.tokenizer is set (docs/fine_tuning.md). null: random initialisation."""

    @property
    def head_size(self) -> int:
        """Dimensions of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    """What to read and how to make rows of tokens of it."""

    dataset: str = "austen"
    """`austen` (inside the package), a Hub name, or a path: text, JSONL, CSV (also .gz, .xz, .bz2, .zst), Parquet, a
    save_to_disk folder or a folder in Hub layout."""
    dataset_config: str | None = None
    """Configuration of a data set on the Hub or in its layout, such as `plain_text` for squad; null where there is one."""
    text_column: str = "text"
    """Column that holds the text."""
    template: str | None = None
    """Text made of several columns, such as "{context}\\n{question}"; replaces text_column. On the command line \\n means a
    newline and \\t a tab. `alpaca`: Stanford Alpaca's prompt, made of the columns instruction and input, with output as the
    completion."""
    completion_template: str | None = None
    """What follows that text, such as " {answer}", and alone carries loss, with the end-of-text token behind it; the text
    before it is the prompt. null: all of a text carries loss."""
    messages_column: str | None = None
    """Column that holds conversations, lists of {"role": ..., "content": ...}; they are written by the chat template, and only
    what the assistant says carries loss. Replaces text_column; null: a column named messages or conversations, if there is
    no column text."""
    chat_template: str | None = None
    """File of the Jinja template that writes conversations, saved with each checkpoint's tokenizer; null: the tokenizer's
    own."""
    bad_records: int | Literal["stop"] = "stop"
    """What to do with a record that cannot be read or used (broken JSON, a missing column, a malformed conversation): stop, or
    skip up to this many per data set; the log names each by file and line."""
    tokenizer: str = "austen"
    """`austen` (inside the package), a Hub name, or a path."""
    sequence_length: int = 256
    """Tokens of one row."""
    packing: bool = True
    """Join documents into full rows; false: one document a row, padded (padding carries no loss)."""
    document_mask: bool = False
    """Keep the documents of a packed row apart: none attends to another, or is trained to say how the next one begins. Without
    packing they are apart anyway."""
    validation_dataset: str | None = None
    """Data set to validate on, named as data.dataset is: its validation split, or all of it where it has none. null:
    data.dataset's validation split, else a part of the training documents."""
    validation_split: str | None = None
    """Split to validate on, such as test; null: the validation split."""
    validation_fraction: float = 0.05
    """Part of the documents held out where no validation split exists; 0: no validation."""
    num_workers: int = 0
    """Worker processes that read ahead, per rank; the token store seldom needs any."""
    cache_dir: str | None = None
    """Where token stores are kept; null: DIST_TRAINER_CACHE, else dist_trainer/ under the user's cache folder."""


@dataclass(frozen=True)
class BatchConfig:
    """Batch sizes; accumulation steps follow from these and the number of ranks."""

    global_batch_size: int = 16
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass of one rank; global_batch_size is a multiple of this times the number of ranks. null: a
    rank's whole share of the global batch, with no accumulation. Dropout is drawn anew for each micro-batch: for the same
    masks on any number of ranks, set this."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer."""

    name: str = "auto"
    """Row of the OPTIMIZERS table (adamw; muon, with AdamW for all but the hidden matrices), or "package.module:function";
    auto: muon for a decoder_lm with random weights, and steps of 16 x hidden_size tokens or more; else adamw."""
    learning_rate: float = 5e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the running mean of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the denominator of AdamW's update."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms and other vectors do not decay."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the step."""

    name: str = "cosine"
    """Row of the SCHEDULES table (cosine, linear, constant, wsd), or "package.module:function"."""
    warmup_steps: int = 40
    """Steps of linear warmup: step s has s / warmup_steps of the peak."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run: it ends at whichever of the two comes first."""

    max_steps: int | None = None
    """Optimizer steps; null: as many as train.epochs asks for, or 300 where that is null too."""
    epochs: float | None = None
    """Passes over the training data; null: no limit but max_steps."""
    on_non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: end the run (exit code 3), or skip that update. fp16 always skips."""
    max_skipped_steps: int = 20
    """Skipped updates in a row after which the run ends all the same."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats and compilation."""

    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Format of the forward and backward pass; auto: bf16 where the GPU has it, else fp16 on GPUs, fp32 on CPU."""
    tf32: bool = False
    """Let GPUs round the factors of fp32 matrix products to 10 bits (TF32): several times as fast, and no longer fp32."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile the model; auto: where the run is long enough (more than some minutes on a GPU, a quarter of an hour on a
    CPU) and the machine has the compilers for it."""


@dataclass(frozen=True)
class ValidationConfig:
    """When and on how much to validate; always once more at the end."""

    every_steps: int = 100
    """Steps between validations; 0: only by every_epochs and at the end."""
    every_epochs: float = 0.0
    """Passes over the training data between validations; 0: only by every_steps and at the end."""
    max_global_batches: int | None = None
    """Validate on this many global batches only, each of batch.global_batch_size sequences over all ranks; null: on every
    validation sequence once."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, what to resume from."""

    every_steps: int = 100
    """Steps between checkpoints; 0: only after a validation with the lowest loss so far, at the end, and on a signal."""
    keep_last: int = 2
    """Newest checkpoints kept, beside the best one."""
    max_failures: int = 5
    """Saves that may fail in a row (a full disk, NaN or infinite weights) before the run ends."""
    resume: str = "auto"
    """auto: go on from the run folder's newest good checkpoint; never: set an earlier run aside and begin anew; or another
    run's or a checkpoint's folder to begin from."""


@dataclass(frozen=True)
class TrackingConfig:
    """What to log, where."""

    log_every_steps: int = 10
    """Steps between training lines: in metrics.jsonl, in the log file, and on a console that is no terminal."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases: files in the run folder (offline), its server (online), or neither (disabled). If set, WANDB_MODE
    wins."""
    wandb_project: str | None = None
    """W&B project, and trackio's; null: WANDB_PROJECT, else dist_trainer."""
    wandb_entity: str | None = None
    """W&B team or user; null: WANDB_ENTITY, else the account's default."""
    wandb_group: str | None = None
    """Group of runs that belong together, in W&B and trackio; null: WANDB_RUN_GROUP, else none."""
    wandb_tags: str | None = None
    """Tags of the run in W&B, separated by commas; null: WANDB_TAGS, else none."""
    wandb_code: bool = False
    """Send this package's Python files to W&B as the run's code; without it, the commit and whether it was changed."""
    tensorboard: bool = False
    """TensorBoard's event files, under the run folder's tensorboard/; needs the package tensorboard."""
    trackio: bool = False
    """trackio's dashboard, in its own folder or where TRACKIO_SPACE_ID says; needs the package trackio."""
    sample_every_steps: int | None = None
    """Steps between samples of text, beside one after the last step; null: one after each validation; 0: none."""
    sample_prompt: str | None = None
    """Beginning of the sample text, or, where data.messages_column is set, a JSON list of messages to answer; null: the first
    words of a validation document, or what comes before its first answer; "": no samples."""
    sample_tokens: int = 96
    """Tokens of a sample; 0: no samples."""


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of single steps goes; see docs/performance.md."""

    steps: str | None = None
    """Steps to record, such as 5-8 or 5, into a trace of each rank under the run folder's profile/; null: none."""


@dataclass(frozen=True)
class DistributedConfig:
    """How ranks work together."""

    strategy: str = "auto"
    """Row of the STRATEGIES table; auto: ddp with several ranks, none with one."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl on GPUs, gloo on CPU."""
    hang_timeout_minutes: float | None = None
    """Minutes without a sign of life, or without progress while other ranks wait, after which a rank is considered hung and the
    run aborts; null: 10 until the first step is done (compilation, loading), then 2. Each micro-batch, each batch that is read
    and each validation batch counts as progress; the limit is never less than ten times the longest step so far. Preparing data
    and saving may take longer."""


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run. The run's folder is output_dir/run_name."""

    run_name: str = "default"
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder that holds the runs' folders."""
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
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


def keys_in_use(model: ModelConfig) -> frozenset[str]:
    """The fields of the model section that this kind of model reads."""
    if model.name == TRANSFORMERS:
        return frozenset(("name", "init_from"))
    return frozenset(field.name for field in fields(ModelConfig))
