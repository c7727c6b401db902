"""Text from a model, token by token. V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dist_trainer.errors import ConfigError
from dist_trainer.models.decoder_lm import DecoderLM, KeyValueCache


def generate(
    model: DecoderLM,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | None = None,
) -> Iterator[int]:
    """Tokens that continue `prompt_tokens`, until `eos_token_id`, `max_new_tokens`, or the end of the model's context.

    `temperature` 0 takes the likeliest token each time. Draws from a generator of its own, and leaves the model's mode as it
    was, so that training is not changed by it. Raises ConfigError for an empty or too long prompt.
    """
    if not prompt_tokens:
        raise ConfigError("the prompt is empty: give it at least one token")
    room = model.max_position_embeddings - len(prompt_tokens)
    if room <= 0:
        raise ConfigError(
            f"the prompt has {len(prompt_tokens)} tokens; the model's context is {model.max_position_embeddings}: shorten it"
        )
    device = model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(len(model.layers))
    was_training = model.training
    model.eval()
    try:
        new = torch.tensor([list(prompt_tokens)], device=device)
        for _ in range(min(max_new_tokens, room)):
            with torch.no_grad():  # not inference_mode: training may use the rotary tables made here
                logits_V = model(new, cache=cache)[0, -1].float().cpu()
            token = choose(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if token == eos_token_id:
                return
            yield token
            new = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


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
