"""Names of keys and values in other trainers and in earlier versions of this one; messages suggest ours.

Names are those of Hugging Face's TrainingArguments, Lightning's Trainer, torchtune and nanoGPT.
"""

from __future__ import annotations

import difflib
from typing import Any

from dist_trainer.config.keys import key_types
from dist_trainer.config.values import choices_of

RENAMED_KEYS = {
    "distributed.timeout_minutes": "distributed.hang_timeout_minutes",
    "validation.max_batches": "validation.max_global_batches",
}
"""Keys of earlier versions and their current names. Only a config.yaml written by a run may still use the old ones."""
OTHER_NAMES = {
    "run_name": "name experiment experiment_name exp_name wandb_run_name",
    "output_dir": "output out out_dir save_dir checkpoint_dir default_root_dir",
    "seed": "random_seed manual_seed",
    "model.init_from": "model_name_or_path model_id model_path pretrained pretrained_model pretrained_model_name_or_path",
    "model.hidden_size": "n_embd d_model dim embed_dim hidden_dim",
    "model.intermediate_size": "d_ff ffn_dim ffn_hidden_size n_inner",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads",
    "data.dataset": "dataset_name dataset_path train_file train_data data_path data_dir",
    "data.dataset_config": "dataset_config_name",
    "data.text_column": "text_field dataset_text_field",
    "data.sequence_length": "block_size max_length max_seq_length max_seq_len seq_len seq_length context_length",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path",
    "data.validation_dataset": "validation_file eval_dataset eval_file",
    "data.validation_fraction": "validation_split validation_split_percentage val_fraction val_split",
    "data.num_workers": "dataloader_num_workers workers",
    "batch.global_batch_size": "batch_size train_batch_size total_batch_size",
    "batch.micro_batch_size": "per_device_train_batch_size per_device_batch_size device_batch_size per_device_eval_batch_size",
    "optim.name": "optimizer optimiser",
    "optim.learning_rate": "lr max_lr peak_lr",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon epsilon",
    "optim.weight_decay": "wd",
    "optim.max_grad_norm": "grad_clip clip_grad_norm gradient_clip_val clip_norm grad_norm_clip",
    "schedule.name": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio",
    "schedule.min_lr_ratio": "min_lr final_lr_ratio",
    "train.max_steps": "steps num_steps train_steps total_steps max_iters iters iterations",
    "train.epochs": "num_train_epochs num_epochs max_epochs",
    "precision.dtype": "bf16 fp16 mixed_precision amp torch_dtype",
    "precision.compile": "torch_compile",
    "validation.every_steps": "eval_steps eval_interval eval_every val_check_interval val_every",
    "validation.max_global_batches": "max_batches eval_iters limit_val_batches",
    "checkpoint.every_steps": "save_steps save_interval save_every",
    "checkpoint.keep_last": "save_total_limit save_top_k",
    "checkpoint.resume": "resume_from resume_from_checkpoint ckpt_path",
    "tracking.log_every_steps": "logging_steps log_interval log_every log_every_n_steps",
    "tracking.wandb": "report_to wandb_log wandb_mode",
    "distributed.strategy": "ddp fsdp",
    "distributed.reduction": "deterministic full_determinism use_deterministic_algorithms deterministic_algorithms "
    "reproducible bitwise all_reduce allreduce reduce_op gradient_reduction comm_hook ddp_comm_hook",
    "distributed.hang_timeout_minutes": "timeout timeout_minutes",
}
NOT_KEYS = {
    "gradient_accumulation_steps gradient_accumulation accumulation_steps grad_accum accumulate_grad_batches": (
        "no such key: it is batch.global_batch_size / (batch.micro_batch_size x ranks); set these two"
    ),
    "resume auto_resume": (
        "no such key: rerunning the same command resumes a run; did you mean checkpoint.resume (auto, never, or a folder)?"
    ),
    "vocab_size": "no such key: it is determined by data.tokenizer and by the model of model.init_from",
    "gpus num_gpus devices num_nodes nproc nproc_per_node world_size": (
        "no such key: it is the number of processes; start them with torchrun or launch/local.sh"
    ),
}
"""Names that have no key here, and what to do instead."""
OTHER_VALUES = {
    "disabled": "none null off false no disable 0",
    "online": "on true yes wandb all 1",
    "bf16": "bfloat16 bf16-mixed bf16-true torch.bfloat16",
    "fp16": "float16 half 16 16-mixed torch.float16",
    "fp32": "float32 float full 32 no none torch.float32",
    "skip": "ignore continue",
}


def unknown_key_message(key: str) -> str:
    """The message for a key that does not exist: what it was renamed to, why there is none, or which one may be meant."""
    if key in RENAMED_KEYS:
        return f"no such key; it was renamed to {RENAMED_KEYS[key]}"
    name = key.rsplit(".", 1)[-1].replace("-", "_")
    for names, message in NOT_KEYS.items():
        if name in names.split():
            return message
    known = list(key_types())
    elsewhere = [known_key for known_key, names in OTHER_NAMES.items() if name in names.split()]
    near = (
        (elsewhere if "." not in key else [])
        or [known_key for known_key in known if known_key.rsplit(".", 1)[-1] == name]
        or elsewhere
        or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    )
    return f"no such key; did you mean {near[0]}?" if near else "no such key; --help all lists them all"


def suggest_value(value: Any, kind: Any) -> str:
    """`; did you mean bf16?` if one of the few values of a key of this type may be meant; otherwise ""."""
    values = [choice for choice in choices_of(kind) if choice not in ("true", "false")]
    written = str(value).lower()
    near = [choice for choice in values if written in OTHER_VALUES.get(choice, "").split()]
    near = near or difflib.get_close_matches(written, values, n=1)
    return f"; did you mean {near[0]}?" if near else ""
