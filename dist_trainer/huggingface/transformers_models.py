"""Loads, initialises, saves and decodes models of transformers with its own code.

It never uses code that comes with a model (trust_remote_code), or pickles. Training DecoderLM does not import transformers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_trainer.errors import CheckpointError, ConfigError, counted, first_line
from dist_trainer.huggingface.llama_config import TokenIds, add_eos_token, merge_token_ids, token_id_set
from dist_trainer.huggingface.model_files import GENERATION_FILE, check_model_folder
from dist_trainer.huggingface.weights import SkipInit, check_tied_head

log = logging.getLogger(__name__)

MAX_NAMES_SHOWN = 4
CACHE_NAMES = ("cache", "past_key_values")
"""The argument of forward with the key-value cache: newer name, older name."""


def is_transformers_model(model: nn.Module) -> bool:
    """Whether `model` is of one of transformers' classes, or of a subclass."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def is_causal_lm(folder: Path) -> bool:
    """Whether transformers has a causal language model of the kind that `folder`/config.json names."""
    import transformers

    return type(_config_of(folder)) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _config_of(folder: Path) -> Any:
    """transformers' config of `folder`/config.json; None if it cannot read it."""
    import transformers

    with _no_progress_bars():
        try:
            check_model_folder(folder)
            return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception:  # the library raises many kinds
            return None


def load_model(folder: Path) -> Any:
    """The causal language model in `folder`, in float32 on the CPU; weights in float32 are mapped from the files, not read.

    Raises ConfigError if transformers cannot build it, CheckpointError if weights are missing or damaged, and as
    `check_model_folder` does.
    """
    import transformers

    check_model_folder(folder)
    with _no_progress_bars():
        try:
            model, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise _not_built(folder, error) from error
    _check_tensors(folder, model, loading_info)
    return model


def init_model(folder: Path, *, seed: int) -> Any:
    """The causal language model that `folder`/config.json describes, initialised by transformers from `seed`, on the CPU.

    Raises ConfigError if transformers cannot build it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(folder)


def build_without_weights(folder: Path) -> Any:
    """The model that `load_model` returns, built without its weights: parameters are uninitialised, everything else (buffers
    that no file has, generation settings) is complete.

    Raises ConfigError if transformers cannot build it, CheckpointError if those settings are damaged.
    """
    # Not on the meta device, where buffers would lose what the constructor writes into them. Memory that was never written
    # takes no space.
    with torch.random.fork_rng(devices=[]), SkipInit():
        return _from_config(folder)


def _from_config(folder: Path) -> Any:
    """The model that `folder`/config.json describes, with its generation settings."""
    import transformers

    check_model_folder(folder)
    with _no_progress_bars():
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise _not_built(folder, error) from error
    settings = folder / GENERATION_FILE
    if settings.is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{settings} cannot be read ({error})") from error
    return model


def save_weights(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write what save_pretrained writes, with `weights` instead of the model's, which training may be changing."""
    with _no_progress_bars():
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="1000TB")


def saved_tensors(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `save_weights` writes, by their names in the file, which may differ from the module's: transformers
    splits what it has fused. `weights` share no memory, so none is left out for being tied to another.
    """
    from transformers.modeling_utils import revert_weight_conversion

    ignored = set(model._keys_to_ignore_on_save or ())
    return dict(revert_weight_conversion(model, {name: weights[name] for name in weights if name not in ignored}))


def make_savable(model: Any) -> None:
    """Repair what transformers refuses to save: settings of sampling while sampling is off, as some models have them."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def load_weights(model: Any, folder: Path) -> None:
    """Copy the weights that `save_weights` wrote into `folder` into `model`. Raises CheckpointError."""
    check_model_folder(folder)
    with _no_progress_bars():
        try:
            loaded, loading_info = type(model).from_pretrained(
                str(folder),
                config=model.config,
                dtype=model.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from error
    _check_tensors(folder, loaded, loading_info)
    model.load_state_dict(loaded.state_dict())


def num_embeddings(model: Any) -> int:
    """How many token ids the model supports."""
    return model.get_input_embeddings().weight.shape[0]


def context_length(model: Any) -> int | None:
    """The number of positions that the model was made for; None if its config.json names no limit."""
    return _max_positions(model.config)


def context_length_of_folder(folder: Path) -> int | None:
    """The same for the config.json in `folder`; also None if transformers cannot read it."""
    config = _config_of(folder)
    return None if config is None else _max_positions(config)


def _max_positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model: Any) -> set[int]:
    """Ids with which the model ends a text."""
    return token_id_set(_eos_token_id(model))


def add_eos_token_to_model(model: Any, trained: int | None) -> None:
    """Add the EOS token that texts are `trained` to end with to those at which checkpoints of `model` stop."""
    ends = add_eos_token(_eos_token_id(model), trained)
    settings, config = getattr(model, "generation_config", None), model.config.get_text_config()
    if settings is not None:
        settings.eos_token_id = ends
    if trained not in token_id_set(getattr(config, "eos_token_id", None)):
        config.eos_token_id = trained  # some kinds of models take no list here


def _eos_token_id(model: Any) -> TokenIds:
    """Those of generation_config.json and config.json."""
    places = (getattr(model, "generation_config", None), model.config.get_text_config())
    return merge_token_ids(*(getattr(place, "eos_token_id", None) for place in places))


def next_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from new tokens [1, T] to the logits [V] after them; it remembers earlier tokens.

    It uses the model's key-value cache if there is one of the usual kind, else processes all tokens again.
    """
    parameters = inspect.signature(type(model).forward).parameters
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    cache, seen = None, None

    def step(new: Tensor) -> Tensor:
        nonlocal cache, seen
        seen = new if seen is None else torch.cat([seen, new], dim=1)
        # Its forward, not the model itself, which may be compiled, and would be compiled again for each length.
        if name is None:
            return model.forward(seen).logits[0, -1]
        # Without a mask some models take ids that equal pad_token_id for padding.
        output = model.forward(new, attention_mask=torch.ones_like(seen), use_cache=True, **{name: cache})
        cache = getattr(output, name)
        return output.logits[0, -1]

    return step


def _check_tensors(folder: Path, model: Any, loading_info: Mapping[str, Any]) -> None:
    """Raises CheckpointError for missing tensors, which transformers would initialise at random, differently on each rank, and
    for a head that should be tied to the embedding but differs. Warns of unused tensors.
    """
    for kind in ("missing_keys", "mismatched_keys"):
        if loading_info.get(kind):
            first = sorted(map(str, loading_info[kind]))[0]
            raise CheckpointError(f"the weights in {folder} are incomplete: {first} is missing, or has another shape")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        check_tied_head(folder, head.weight, embedding.weight)
        model.tie_weights()
    if left_over := sorted(map(str, loading_info.get("unexpected_keys") or ())):
        names = ", ".join(left_over[:MAX_NAMES_SHOWN]) + (", ..." if len(left_over) > MAX_NAMES_SHOWN else "")
        log.warning(
            "the weights in %s contain %s that %s does not use: %s",
            *(folder, counted(len(left_over), "tensor"), type(model).__name__, names),
        )


def _not_built(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{folder}: transformers cannot build a causal language model from it: {first_line(error)}")


@contextmanager
def _no_progress_bars() -> Generator[None]:
    """Every rank would show its own."""
    from transformers.utils import logging as library

    shows = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            library.enable_progress_bar()
