"""The sequences as a dataset, for trainers that take one: one at a time, in the order that all contestants use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.workloads import Workload


class TokenDataset(Dataset):
    """`shifted`: with the targets as `shift_labels` too; otherwise transformers' models would shift the labels again."""

    def __init__(self, workload: Workload, *, shifted: bool = False) -> None:
        self.shifted = shifted
        self.sequences = workload.all_sequences().reshape(-1, workload.size.sequence_length + 1)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sequence = torch.from_numpy(self.sequences[index].astype("int64"))
        labels = {"labels": sequence[1:], "shift_labels": sequence[1:]} if self.shifted else {"labels": sequence[1:]}
        return {"input_ids": sequence[:-1], **labels}
