"""Folders in the format of Hugging Face's LlamaForCausalLM; written and read without transformers, a slow import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.huggingface.hub import is_in_hub_cache
from dist_trainer.huggingface.model_files import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKEN_IDS,
    WEIGHTS_FILE,
    check_model_folder,
    weight_files,
)
from dist_trainer.huggingface.model_folders import model_folders
from dist_trainer.storage.manifest import MANIFEST, verify

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_PREFIX = "model."
_ROWS_COMPARED = 4096


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
    """Name and tensor of each weight in `folder`, one file or sharded, in the format in which it stands there.

    Bounded in memory: files are mapped, one at a time, and their tensors are views that the caller copies from. Raises
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
    """Each tensor in `folder` after the one of a DecoderLM's `parameters` that it is for; None: the head, which is tied to the
    embedding, but which some files hold all the same.

    Raises CheckpointError where one is missing, has another shape, or would be left over.
    """
    missing, tied_head = set(parameters), None
    for name, tensor in from_hf_names(read_hf_weights(folder)):
        mine = parameters.get(name)
        if mine is None and name != HEAD:
            raise CheckpointError(f"the weights in {folder} hold {name}, of which its config.json says nothing")
        if mine is not None and tensor.shape != mine.shape:
            shapes = f"{list(tensor.shape)} there and {list(mine.shape)} here"
            raise CheckpointError(f"the weights in {folder} do not fit: {name} is {shapes}")
        if mine is None:
            tied_head = tensor
        yield mine, tensor
        missing.discard(name)
    if missing == {EMBEDDING} and tied_head is not None and tied_head.shape == parameters[EMBEDDING].shape:
        yield parameters[EMBEDDING], tied_head  # of the two names safetensors' save_model keeps the first alone
        missing.clear()
    if missing:
        raise CheckpointError(f"the weights in {folder} are not whole: there is no {sorted(missing)[0]}")


def check_tied_head(folder: Path, head: Tensor, embedding: Tensor) -> None:
    """Raises CheckpointError where the `head` that `folder` holds differs from the `embedding`, to which config.json ties it.

    Compared in the embedding's number format, by parts: both are large.
    """
    same_shape = head.shape == embedding.shape
    parts = zip(head.split(_ROWS_COMPARED), embedding.split(_ROWS_COMPARED), strict=False)
    if not same_shape or not all(torch.equal(ours.to(theirs), theirs) for ours, theirs in parts):
        raise CheckpointError(
            f"the weights in {folder} hold an output head ({HEAD}) that differs from the embedding, but its config.json has "
            "tie_word_embeddings true; set that to false to use the head, or remove the head from the file"
        )


def locate_weights(path: Path) -> Path:
    """The folder with weights that `path` means: itself, or the best, latest or newest checkpoint of a run folder.

    Raises CheckpointError where there is none, or where a checkpoint's model is not as it was written.
    """
    return _checked(find_model(path), CONFIG_FILE, GENERATION_FILE, WEIGHTS_FILE)


def locate_shape(path: Path) -> Path:
    """As `locate_weights`, where the weights will not be read."""
    return _checked(find_model(path), CONFIG_FILE, GENERATION_FILE)


def _checked(folder: Path, *names: str) -> Path:
    is_ours = (folder / MANIFEST).is_file() and (folder / "trainer_state.json").is_file()
    if is_ours and not is_in_hub_cache(folder):
        verify(folder, only=names)
    return folder


def find_model(path: Path) -> Path:
    """As `locate_weights`, without a look at the files."""
    if (path / CONFIG_FILE).is_file():
        return path
    folders = list(model_folders(path))
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            return folder.resolve()
    described_by_code = next(filter(_is_checkpoint, folders), None)
    if described_by_code is not None:
        raise ConfigError(
            f"{described_by_code} is a checkpoint of a model of your own (model.name), without {CONFIG_FILE}: only "
            "training can go on from it; generate, evaluate and model.init_from open DecoderLM and models of transformers"
        )
    check_model_folder(path)
    raise CheckpointError(f"{path} is neither a run folder with checkpoints, nor a checkpoint, nor a Hugging Face model folder")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / WEIGHTS_FILE).is_file()
