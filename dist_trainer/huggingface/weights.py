"""Weights in the format of Hugging Face's LlamaForCausalLM, without transformers (slow to import); modules without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dist_trainer.errors import CheckpointError
from dist_trainer.huggingface.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKEN_IDS,
    WEIGHTS_FILE,
    check_model_folder,
    weight_files,
)

Module = TypeVar("Module", bound=nn.Module)

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_PREFIX = "model."
_VECTORS_COMPARED = 4096
_INITIALIZERS = {nn.init.__name__, "transformers.initialization"}
"""Modules with the functions that initialise parameters; transformers replaces torch's by its own."""


def write_hf(
    folder: Path, *, state: Mapping[str, Tensor], config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors; `state` is a DecoderLM's state_dict.

    `generation`: the generation settings of the model that training started from, if any; end tokens are those of `config`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    kept = generation or {"_from_model_config": True, **{key: config.get(key) for key in TOKEN_IDS}}
    settings = {**kept, "eos_token_id": config.get("eos_token_id")}
    (folder / GENERATION_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(to_hf_names(state), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def to_hf_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DecoderLM's tensors under LlamaForCausalLM's names."""
    return {name if name == HEAD else _PREFIX + name: tensor.contiguous() for name, tensor in state.items()}


def from_hf_names(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """LlamaForCausalLM's tensors under DecoderLM's names."""
    for name, tensor in tensors:
        if not name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints still carry
            yield name.removeprefix(_PREFIX), tensor


def read_hf_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight in `folder`, one file or sharded, in the number format of the file.

    Memory is bounded: files are mapped, one at a time, and tensors are views that the caller copies from. Raises
    CheckpointError.
    """
    check_model_folder(folder)
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield key, file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def matched_weights(folder: Path, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Tensor | None, Tensor]]:
    """(parameter, tensor) for each tensor in `folder` and its parameter among a DecoderLM's `parameters`, or None for a
    head that is tied to the embedding, which some files contain nevertheless.

    Raises CheckpointError if a tensor is missing, has another shape, or has no parameter.
    """
    missing, tied_head = set(parameters), None
    for name, tensor in from_hf_names(read_hf_weights(folder)):
        parameter = parameters.get(name)
        if parameter is None and name != HEAD:
            raise CheckpointError(f"the weights in {folder} contain {name}, which its config.json does not describe")
        if parameter is not None and tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)} in the file, but {list(parameter.shape)} in the model"
            raise CheckpointError(f"the weights in {folder} do not fit: {name} is {shapes}")
        if parameter is None:
            tied_head = tensor
        yield parameter, tensor
        missing.discard(name)
    if missing == {EMBEDDING} and tied_head is not None and tied_head.shape == parameters[EMBEDDING].shape:
        yield parameters[EMBEDDING], tied_head  # of the two names safetensors' save_model keeps only the first
        missing.clear()
    if missing:
        raise CheckpointError(f"the weights in {folder} are incomplete: {sorted(missing)[0]} is missing")


def check_tied_head(folder: Path, head: Tensor, embedding: Tensor) -> None:
    """Raises CheckpointError if the `head` in `folder` differs from the `embedding`, to which config.json ties it.

    Compared in the embedding's number format, part by part: both are large.
    """
    parts = zip(head.split(_VECTORS_COMPARED), embedding.split(_VECTORS_COMPARED), strict=False)
    if head.shape != embedding.shape or not all(torch.equal(part.to(expected), expected) for part, expected in parts):
        raise CheckpointError(
            f"the weights in {folder} contain an output head ({HEAD}) that differs from the embedding, but its config.json has "
            "tie_word_embeddings true; set that to false to use the head, or remove the head from the file"
        )


@contextmanager
def meta_init() -> Generator[None]:
    """Modules built inside are on the meta device: shapes without memory. Initialisers do nothing, for on the meta device they
    would import torch's compiler to compute shapes, one or two seconds of every start.
    """
    with torch.device("meta"), SkipInit():
        yield


class SkipInit(TorchFunctionMode):
    """Initialisers (torch.nn.init) leave the parameters of modules built inside as they are."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in _INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):  # not buffers, which no file may have
                return tensor
        return func(*args, **kwargs)


def materialize(model: Module, device: torch.device) -> Module:
    """Give the parameters of `model`, which are on the meta device, uninitialised memory on `device`. It has no buffers."""
    assert not list(model.buffers()), "nothing would initialise buffers"
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:  # otherwise it is tied to one that was
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
    return model
