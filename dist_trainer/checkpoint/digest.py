"""The digest of a model's weights: equal for equal bits, whatever they were computed with and wherever they are.

It depends only on names, number formats, shapes and bytes; not on the strategy, the number of ranks, the device, compilation,
or the order and memory layout of the tensors. It detects differences, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dist_trainer.huggingface.weights import read_hf_weights

_DIGEST_BYTES = 32


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """64 hexadecimal digits for named `weights`: all parameters and persistent buffers, by the names in a checkpoint's file.

    They may come one at a time, in any order.
    """
    return combined_digest(tensor_digests(weights))


def digest_of_folder(folder: Path) -> str:
    """`weights_digest` of the safetensors files in a checkpoint or Hugging Face model `folder`, one file or sharded.

    Bounded memory: files are mapped. Raises CheckpointError if there are none, or they cannot be read.
    """
    return weights_digest(read_hf_weights(folder))


def tensor_digests(weights: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The digest of each tensor by its name, to find which ones differ: BLAKE2b of `float32 [4096, 256]`, a line break, and its
    elements in C order, little-endian as in the file.
    """
    return {name: _tensor_digest(tensor) for name, tensor in weights}


def combined_digest(digests: Mapping[str, str]) -> str:
    """The digest of weights from `tensor_digests`: BLAKE2b of these as a JSON object, sorted by name."""
    return hashlib.blake2b(json.dumps(dict(digests), sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    header = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n"
    digest = hashlib.blake2b(header.encode(), digest_size=_DIGEST_BYTES)
    elements = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    digest.update(elements.view(torch.uint8).numpy().data)  # bytes, because numpy has no bfloat16
    return digest.hexdigest()
