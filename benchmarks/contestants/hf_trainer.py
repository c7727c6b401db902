"""Hugging Face's Trainer with its defaults; `compiled` adds its torch_compile."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments

from benchmarks import workloads
from benchmarks.contestants.model import adamw, build
from benchmarks.contestants.rows import Rows
from benchmarks.stopwatch import Stopwatch, workload_here, write_result


class WithLoss(nn.Module):
    """A model as its Trainer wants it: the loss comes first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())}


class InOrder(Trainer):
    """Without shuffling: the rows lie in the order in which all contestants take them."""

    def _get_train_sampler(self, *_: object) -> Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


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
    )
    model = WithLoss(build(workload, arguments.device))
    optimizer = adamw(model)
    stopwatch = Stopwatch(workload)
    stopwatch.watch(optimizer)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = InOrder(model, arguments, train_dataset=Rows(workload), optimizers=(optimizer, constant))
    trainer.train()
    write_result(stopwatch, None)


if __name__ == "__main__":
    main(set(sys.argv[1:]))
