"""Text from a model, token by token. V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from dist_trainer.errors import ConfigError, counted
from dist_trainer.huggingface import transformers_models
from dist_trainer.models.decoder_lm import DecoderLM, KeyValueCache
from dist_trainer.models.evaluation_mode import evaluation_mode


def can_generate(model: nn.Module) -> bool:
    """Whether `generate` knows how to ask `model` for its next token."""
    return isinstance(model, DecoderLM) or transformers_models.is_of_transformers(model)


def context_of(model: nn.Module) -> int | None:
    """Positions that `model` was made for; None: without limit."""
    return model.max_position_embeddings if isinstance(model, DecoderLM) else transformers_models.context_of(model)


def end_tokens(model: nn.Module) -> set[int]:
    """Ids after which the model's own config says that nothing follows."""
    if not isinstance(model, DecoderLM):
        return transformers_models.end_tokens(model)
    ids = model.token_ids["eos_token_id"]
    return set(ids) if isinstance(ids, list) else set() if ids is None else {ids}


def generate(
    model: nn.Module,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Collection[int] | None = None,
) -> Iterator[int]:
    """Tokens that continue `prompt_tokens`, until `eos_token_id` (or one of them), `max_new_tokens`, or the end of the
    model's context. `model` is a DecoderLM, or one of transformers.

    `temperature` 0 takes the likeliest token each time. Draws from a generator of its own, and leaves the model's mode as it
    was, so that training is not changed by it. Raises ConfigError for an empty or too long prompt.
    """
    if not prompt_tokens:
        raise ConfigError("the prompt is empty: give it at least one token")
    context = context_of(model)
    room = max_new_tokens if context is None else context - len(prompt_tokens)
    if room <= 0 < max_new_tokens:
        raise ConfigError(
            f"the prompt has {counted(len(prompt_tokens), 'token')}; the model's context is {context}: shorten it"
        )
    ends = eos_token_id if isinstance(eos_token_id, Collection) else {eos_token_id}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model):
        logits_after = _next_logits(model)
        new = torch.tensor([list(prompt_tokens)], device=device)
        for _ in range(min(max_new_tokens, room)):
            with torch.no_grad():  # not inference_mode: training may use the rotary tables made here
                logits_V = logits_after(new).float().cpu()
            token = choose(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token in ends:
                return
            yield token
            new = torch.tensor([[token]], device=device)


def _next_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function from the tokens [1, T] that are new to the logits [V] after them; it remembers those before."""
    if not isinstance(model, DecoderLM):
        return transformers_models.next_logits(model)
    cache = KeyValueCache(len(model.layers))
    return lambda new: model(new, cache=cache)[0, -1]


def choose(logits_V: Tensor, *, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator) -> int:
    """One token, drawn from softmax(logits / temperature) cut to the `top_k` likeliest and to a total of `top_p`."""
    if temperature == 0:
        return int(logits_V.argmax())
    # The likeliest token stands at 0 and in double precision, so that no temperature above 0 makes it infinite.
    logits_V = (logits_V - logits_V.max()).double() / temperature
    if top_k is not None and top_k < logits_V.numel():
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    probabilities_V, order_V = logits_V.softmax(-1).sort(descending=True)
    if top_p is not None:
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        probabilities_V = probabilities_V.masked_fill(before_V >= top_p, 0.0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])
