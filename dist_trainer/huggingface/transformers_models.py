"""The one door to models of transformers: opened, made, saved and asked for their next token by its own code.

Never by code that comes with a model (trust_remote_code), and never from pickles. Who trains DecoderLM does not import it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_trainer.errors import CheckpointError, ConfigError, counted
from dist_trainer.huggingface.llama_config import TokenIds, joined_ids, with_end_token
from dist_trainer.huggingface.meta_init import SkipInit
from dist_trainer.huggingface.model_files import INDEX_FILE, WEIGHTS_FILE, check_model_folder
from dist_trainer.huggingface.weights import check_tied_head
from dist_trainer.models.loss import takes

log = logging.getLogger(__name__)

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt", "*.gguf", "*.safetensors")
"""Files that hold weights in a way that is not read here: by them a folder is told from one with a config.json alone."""
NAMES_SHOWN = 4
CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls keys and values of the tokens before: newer name, older name."""


def is_of_transformers(model: nn.Module) -> bool:
    """Whether `model` is one of transformers' own classes, or made from one."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def has_weights(folder: Path) -> bool:
    """Whether `folder` has weights beside its config.json. Raises ConfigError where it has them in another format only."""
    if (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return True
    others = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
    if others:
        raise ConfigError(
            f"{folder} has weights in {others[0]}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}: pickles and other formats are "
            "not opened; save the model once with transformers' save_pretrained"
        )
    return False


def is_known(folder: Path) -> bool:
    """Whether transformers itself has a causal language model of the kind that `folder`/config.json names."""
    import transformers

    return type(_config_of(folder)) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _config_of(folder: Path) -> Any:
    """What transformers reads from `folder`/config.json; None where it cannot."""
    import transformers

    with _quietly():
        try:
            check_model_folder(folder)
            return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception:  # the library raises many kinds
            return None


def open_weights(folder: Path) -> Any:
    """The causal language model in `folder`, in float32 on the CPU; weights that the files hold in float32 are not read, but
    mapped.

    Raises ConfigError where transformers cannot make one of it, CheckpointError where weights are missing or damaged, and as
    `check_model_folder` does.
    """
    import transformers

    check_model_folder(folder)
    with _quietly():
        try:
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise _in_a_sentence(folder, error) from error
    _check_tensors(folder, model, told)
    return model


def make_anew(folder: Path, *, seed: int) -> Any:
    """The causal language model that `folder`/config.json describes, with weights drawn by transformers from `seed`; CPU.

    Raises ConfigError where transformers cannot make one of it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(folder)


def make_skeleton(folder: Path) -> Any:
    """The model that `open_weights` opens, made without a look at the weights: parameters have memory that holds nothing yet,
    all else (buffers that no file has, settings of generation) is as it is there.

    Raises ConfigError where transformers cannot make one of it, CheckpointError where those settings are damaged.
    """

    # On the CPU, not by way of the meta device, where buffers would lose what the constructor puts into them. Memory that
    # nobody has written to takes no room.
    with torch.random.fork_rng(devices=[]), SkipInit():
        model = _from_config(folder)
    return model


def _from_config(folder: Path) -> Any:
    """The model that `folder`/config.json describes, with the settings of generation beside it."""
    import transformers

    check_model_folder(folder)
    with _quietly():
        try:
            config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise _in_a_sentence(folder, error) from error
    settings = folder / transformers.utils.GENERATION_CONFIG_NAME
    if settings.is_file():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{settings} cannot be read ({error})") from error
    return model


def write_weights(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """What save_pretrained writes, with `weights` in place of the model's, which training may be changing meanwhile."""
    with _quietly():
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size="1000TB")


def make_savable(model: Any) -> None:
    """Repair what transformers refuses to save: sampling's settings where sampling is off, as some models have them."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def copy_weights(model: Any, folder: Path) -> None:
    """Copy what `write_weights` wrote into `folder` back into `model`. Raises CheckpointError."""
    check_model_folder(folder)
    with _quietly():
        try:
            found, told = type(model).from_pretrained(
                str(folder),
                config=model.config,
                dtype=model.dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # the library raises many kinds; each ends in one message
            raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from error
    _check_tensors(folder, found, told)
    model.load_state_dict(found.state_dict())


def num_embeddings(model: Any) -> int:
    """How many token ids the model knows."""
    return model.get_input_embeddings().weight.shape[0]


def context_of(model: Any) -> int | None:
    """Positions that the model was made for; None where its config.json names no limit."""
    return _positions_of(model.config)


def context_of_folder(folder: Path) -> int | None:
    """The same of the config.json in `folder`; None too where transformers cannot read it."""
    config = _config_of(folder)
    return None if config is None else _positions_of(config)


def _positions_of(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def end_tokens(model: Any) -> set[int]:
    """Ids after which the model says that nothing follows."""
    return _as_set(_ends(model))


def add_end_token(model: Any, trained: int | None) -> None:
    """Make checkpoints of `model` stop at the end token that its texts are `trained` to end with, besides those that it has."""
    ends = with_end_token(_ends(model), trained)
    settings, config = getattr(model, "generation_config", None), model.config.get_text_config()
    if settings is not None:
        settings.eos_token_id = ends
    if trained not in _as_set(getattr(config, "eos_token_id", None)):
        config.eos_token_id = trained  # some kinds of models take no list here


def _ends(model: Any) -> TokenIds:
    """Those of generation_config.json and of config.json."""
    places = (getattr(model, "generation_config", None), model.config.get_text_config())
    return joined_ids(*(getattr(place, "eos_token_id", None) for place in places))


def _as_set(ids: TokenIds) -> set[int]:
    return set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {ids}


def next_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from the tokens [1, T] that are new to the logits [V] after them; it remembers those before.

    By keys and values where the model keeps them as most do, else by reading all tokens anew.
    """
    name = next((name for name in CACHE_NAMES if takes(model, name)), None)
    cache, seen = None, None

    def step(new: Tensor) -> Tensor:
        nonlocal cache, seen
        seen = new if seen is None else torch.cat([seen, new], dim=1)
        # Its forward, not the model itself, which may be compiled, and would be once more for each length.
        if name is None:
            return model.forward(seen).logits[0, -1]
        # The mask says that all are text: without one some models take ids that equal pad_token_id for padding.
        found = model.forward(new, attention_mask=torch.ones_like(seen), use_cache=True, **{name: cache})
        cache = getattr(found, name)
        return found.logits[0, -1]

    return step


def _check_tensors(folder: Path, model: Any, told: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is missing, which transformers would draw at random, on each rank another, and for a head
    apart from the embedding that it should be; warns of what is left over.
    """
    for kind in ("missing_keys", "mismatched_keys"):
        if told.get(kind):
            first = sorted(map(str, told[kind]))[0]
            raise CheckpointError(f"the weights in {folder} are not whole: {first} is missing, or has another shape there")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embedding.weight:
        check_tied_head(folder, head.weight, embedding.weight)
        model.tie_weights()
    if left_over := sorted(map(str, told.get("unexpected_keys") or ())):
        names = ", ".join(left_over[:NAMES_SHOWN]) + (", ..." if len(left_over) > NAMES_SHOWN else "")
        log.warning(
            "the weights in %s hold %s that %s does not use: %s",
            *(folder, counted(len(left_over), "tensor"), type(model).__name__, names),
        )


def _in_a_sentence(folder: Path, error: Exception) -> ConfigError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(f"{folder}: transformers makes no causal language model of it: {first_line[:400]}")


@contextmanager
def _quietly() -> Generator[None]:
    """Without progress bars, which are each rank's."""
    from transformers.utils import logging as library

    shows = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shows:
            library.enable_progress_bar()
