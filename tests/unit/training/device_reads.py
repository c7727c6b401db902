"""Counts what would make the host wait for the device in a trainer's steps, on machines that have none.

On a CPU nothing ever waits, so what counts is derived: a tensor is the device's where a step computed it or took it, and
where it was made of such a one. To read its values, or to make a shape of them, is to wait. Host tensors (a batch's
targets before they are copied, what ranks tell one another) may be read as one likes; inside of a step there are none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dist_trainer.training.trainer import Trainer

READING = {
    "_local_scalar_dense",  # item, bool, float, int, index, and a format
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
"""Operators that a GPU has to finish first; and an index by a mask."""
READING_METHODS = ("numpy", "__array__", "tolist", "cpu", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero")
"""Those that read memory without an operator are among them."""


class DeviceReads(TorchDispatchMode):
    """Watches a trainer: the reads of each step, from where it begins to where the next one does."""

    def __init__(self) -> None:
        super().__init__()
        self.by_step: dict[int, list[str]] = {0: []}
        self._of_device: Any = WeakIdKeyDictionary()
        self._step, self._in_step, self._thread = 0, False, threading.get_ident()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_device = self._in_step or any(tensor in self._of_device for tensor in given)
        if of_device and (name in READING or (name == "index" and any(t.dtype is torch.bool for t in given[1:]))):
            self._note(name)
        made = func(*args, **(kwargs or {}))
        non_blocking = (args[2] if len(args) > 2 else (kwargs or {}).get("non_blocking", False)) if name == "copy_" else False
        if non_blocking and not self._in_step:  # on its way to the host; it is to be waited for by an event
            self._of_device.pop(args[0], None)
        elif of_device:
            for tensor in [*given, *(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))]:
                self._of_device[tensor] = True
        return made

    def watch(self, trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
        """Let the steps of `trainer` be watched, as if it were on a GPU."""
        train_step = trainer.train_step

        def watched(*arguments: Any) -> Any:
            self._step, self._in_step = trainer.progress.step + 1, True
            self.by_step[self._step] = []
            try:
                return train_step(*arguments)
            finally:
                self._in_step = False

        patch.setattr(trainer, "train_step", watched)
        for method in READING_METHODS:
            patch.setattr(Tensor, method, self._watched_method(method, getattr(Tensor, method)))
        patch.setattr(Tensor, "to", self._watched_to(Tensor.to))
        patch.setattr(torch.cuda, "synchronize", lambda *_: self._note("torch.cuda.synchronize"))
        self._pretend_gpu(trainer, patch)

    def _watched_method(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            self._note_if_of_device(name, tensor)
            return method(tensor, *arguments, **named)

        return call

    def _watched_to(self, to: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
            # By that word: where code moves a tensor to its own device, it has that as an object (and here it is the CPU).
            if any(isinstance(value, str) and value == "cpu" for value in (*arguments, *named.values())):
                self._note_if_of_device("to cpu", tensor)
            return to(tensor, *arguments, **named)

        return call

    def _note_if_of_device(self, name: str, tensor: Tensor) -> None:
        if self._in_step or tensor in self._of_device:
            self._note(name)

    def _pretend_gpu(self, trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
        """Nothing is read at once; the divergence watch reads as on a GPU: a copy in pinned memory, once an event says that
        it has arrived.
        """
        reads, empty_like = self, torch.empty_like

        class Event:
            recorded_in_step = 0

            def __init__(self, **options: Any) -> None:
                pass

            def record(self) -> None:
                self.recorded_in_step = reads._step

            def synchronize(self) -> None:
                if self.recorded_in_step >= reads._step:
                    reads._note("wait for what was launched just now")

        patch.setattr(trainer.precision, "_is_on_host", False)
        patch.setattr(trainer.divergence, "_on_gpu", True)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch, "empty_like", lambda tensor, *, pin_memory=False, **named: empty_like(tensor, **named))

    def _note(self, name: str) -> None:
        if threading.get_ident() == self._thread:  # others may wait
            self.by_step[self._step].append(name)
