"""Token-by-token decoding. T sequence, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_trainer.errors import ConfigError, counted
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.llama_config import token_id_set
from dist_trainer.models.decoder_lm import DecoderLM, KeyValueCache
from dist_trainer.models.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: greedy."""
    top_k: int | None = None
    """Sample from the k most likely tokens."""
    top_p: float | None = None
    """Nucleus sampling: sample from the most likely tokens up to this total probability."""
    seed: int = 0


def can_generate(model: nn.Module) -> bool:
    """Whether `generate` supports `model`."""
    return isinstance(model, DecoderLM) or transformers_models.is_transformers_model(model)


def context_length(model: nn.Module) -> int | None:
    """The maximum number of positions that `model` supports; None: unlimited."""
    return model.max_position_embeddings if isinstance(model, DecoderLM) else transformers_models.context_length(model)


def end_tokens(model: nn.Module) -> set[int]:
    """The end-of-sequence ids in the model's config."""
    if not isinstance(model, DecoderLM):
        return transformers_models.eos_token_ids(model)
    return token_id_set(model.token_ids["eos_token_id"])


def prompt_too_long(length: int, context: int | None) -> str:
    """The message for a prompt of `length` tokens that leaves no room in the model's context."""
    return f"the prompt has {counted(length, 'token')}; the model's context is {context}: shorten it"


def generate(
    model: nn.Module,
    prompt_tokens: Sequence[int],
    options: DecodingOptions,
    *,
    end_token_ids: Collection[int | None] = (),
) -> Iterator[int]:
    """Yield tokens that continue `prompt_tokens`, until one of `end_token_ids`, `options.max_new_tokens`, or the end of the
    model's context. `model` is a DecoderLM or a causal LM of transformers.

    Uses its own random generator and restores the model's mode, so it does not affect training. Raises ConfigError if the
    prompt is empty or too long.
    """
    if not prompt_tokens:
        raise ConfigError("the prompt is empty: give it at least one token")
    context = context_length(model)
    room = options.max_new_tokens if context is None else context - len(prompt_tokens)
    if room <= 0 < options.max_new_tokens:
        raise ConfigError(prompt_too_long(len(prompt_tokens), context))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(options.seed)
    with evaluation_mode(model):
        next_logits = _next_logits(model)
        new_tokens = torch.tensor([list(prompt_tokens)], device=device)
        for _ in range(min(options.max_new_tokens, room)):
            with torch.no_grad():  # not inference_mode: training may reuse the rotary tables made here
                logits_V = next_logits(new_tokens).float().cpu()
            token = draw(logits_V, options, generator)
            if token in end_token_ids:
                return
            yield token
            new_tokens = torch.tensor([[token]], device=device)


def _next_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from new tokens [1, T] to the logits [V] of the next one; it caches keys and values of earlier tokens."""
    if not isinstance(model, DecoderLM):
        return transformers_models.next_logits(model)
    cache = KeyValueCache(len(model.layers))
    return lambda new_tokens: model(new_tokens, cache=cache)[0, -1]


def draw(logits_V: Tensor, options: DecodingOptions, generator: torch.Generator) -> int:
    """One token drawn from softmax(logits / temperature), restricted to the `top_k` most likely and to a total of `top_p`."""
    top_k, top_p = options.top_k, options.top_p
    if options.temperature == 0:
        return int(logits_V.argmax())
    # Largest logit 0, in double precision: no temperature above 0 overflows.
    logits_V = (logits_V - logits_V.max()).double() / options.temperature
    if top_k is not None and top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    probabilities_V, order_V = logits_V.softmax(-1).sort(descending=True)
    if top_p is not None:
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        probabilities_V = probabilities_V.masked_fill(before_V >= top_p, 0.0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])
