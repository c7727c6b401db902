"""Hugging Face's Trainer with its defaults; `compiled` adds its torch_compile.

With DecoderLM, or (`llama`) with transformers' own Llama and the same weights, which is what its users have.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from benchmarks import workloads
from benchmarks.contestants.model import adamw, build
from benchmarks.contestants.token_dataset import TokenDataset
from benchmarks.stopwatch import Stopwatch, workload_here, write_result
from benchmarks.workloads import Workload


class WithLoss(nn.Module):
    """A model with the interface that its Trainer expects: the loss comes first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())}


def llama(workload: Workload) -> nn.Module:
    """DecoderLM's weights in LlamaForCausalLM, which has its own loss."""
    from transformers import LlamaForCausalLM

    folder = workload.folder / f"llama-{os.environ.get('RANK', '0')}"
    build(workload, torch.device("cpu")).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model


class InOrder(Trainer):
    """Does not shuffle: the sequences are already in the order that all contestants use. Remembers the last loss."""

    last_loss: Tensor

    def _get_train_sampler(self, *_: object) -> Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, *inputs: Any, **options: Any) -> Tensor:
        loss = super().compute_loss(*inputs, **options)
        self.last_loss = loss.detach()
        return loss


def main(flags: set[str]) -> None:
    workload = workload_here()
    arguments = TrainingArguments(
        output_dir=str(workload.folder / "hf"),
        per_device_train_batch_size=workload.size.rows_per_rank,
        max_steps=workload.total_steps,
        learning_rate=workloads.LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=workloads.MAX_GRAD_NORM,
        use_cpu=not torch.cuda.is_available(),
        bf16=workload.dtype == "bf16",
        fp16=workload.dtype == "fp16",
        torch_compile="compiled" in flags,
        save_strategy="steps" if workload.save else "no",
        save_steps=workload.save_at,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,  # it would remove shift_labels
    )
    model = llama(workload) if "llama" in flags else WithLoss(build(workload, arguments.device))
    optimizer = adamw(model)
    stopwatch = Stopwatch(workload)
    stopwatch.watch(optimizer)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    sequences = TokenDataset(workload, shifted="llama" in flags)
    trainer = InOrder(model, arguments, train_dataset=sequences, optimizers=(optimizer, constant))
    trainer.train()
    write_result(stopwatch, float(trainer.last_loss))


if __name__ == "__main__":
    main(set(sys.argv[1:]))
