"""PyTorch Lightning's Trainer with its defaults; `compiled` compiles the module."""

from __future__ import annotations

import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import workloads
from benchmarks.contestants.model import adamw, build
from benchmarks.contestants.token_dataset import TokenDataset
from benchmarks.stopwatch import Stopwatch, workload_here, write_result
from benchmarks.workloads import Workload

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Module(lightning.LightningModule):
    """The model with its loss and optimizer, as a LightningModule."""

    def __init__(self, workload: Workload, stopwatch: Stopwatch, *, compiled: bool) -> None:
        super().__init__()
        self.model = build(workload, torch.device("cpu"))
        if compiled:
            self.model.compile(dynamic=False)
        self.workload, self.stopwatch = workload, stopwatch

    def training_step(self, sequences: dict[str, Tensor], _: int) -> Tensor:
        logits = self.model(sequences["input_ids"])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), sequences["labels"].flatten())

    def configure_optimizers(self) -> Optimizer:
        # Under mixed precision Lightning does not clip gradients for a fused optimizer.
        optimizer = adamw(self.model, fused=self.workload.dtype == "fp32")
        self.stopwatch.watch(optimizer)
        return optimizer


def main(flags: set[str]) -> None:
    workload = workload_here()
    stopwatch = Stopwatch(workload)
    save = ModelCheckpoint(workload.folder / "lightning", every_n_train_steps=workload.save_at, save_top_k=-1)
    trainer = lightning.Trainer(
        default_root_dir=workload.folder / "lightning",
        devices=workload.ranks if not torch.cuda.is_available() else 1,
        strategy="ddp" if workload.ranks > 1 else "auto",
        precision=PRECISIONS[workload.dtype],  # type: ignore[arg-type]
        max_steps=workload.total_steps,
        gradient_clip_val=workloads.MAX_GRAD_NORM,
        callbacks=[save] if workload.save else None,
        enable_checkpointing=workload.save,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(TokenDataset(workload), batch_size=workload.size.rows_per_rank)
    trainer.fit(Module(workload, stopwatch, compiled="compiled" in flags), data)
    write_result(stopwatch, None)


if __name__ == "__main__":
    main(set(sys.argv[1:]))
