"""The cost of data.document_mask: CPU time of a step with it over one without, in alternating rounds.

python benchmarks/document_mask.py [--dtype bfloat16] [--compile]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from dist_trainer.config.schema import ModelConfig, OptimConfig
from dist_trainer.data.packing import PackedDataset, TokenStream
from dist_trainer.data.token_store import TokenStore
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.models.loss import model_loss
from dist_trainer.optim.registry import build_optimizer
from dist_trainer.parallel.compile import compile_model

ROUNDS = 9
TOKENS, DOCUMENT_TOKENS = 1_000_000, 400
WIDER = ModelConfig(hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4)
MODELS = {"the default, 2.4M": (ModelConfig(), 4096), "6 layers of 256, 6.9M": (WIDER, 8192)}
SHAPES = ((256, 8), (1024, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="each block, as precision.compile true does")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {vars(arguments)}, {ROUNDS} rounds")
    print("| model | heads | sequence length | sequences | CPU s a step without | with over without, median (min to max) |")
    print("|---|---|---|---|---|---|")
    for name, (model, vocabulary) in MODELS.items():
        for length, sequences in SHAPES:
            without, masked = (
                stepper(
                    *(model, vocabulary, length, sequences, getattr(torch, arguments.dtype)),
                    document_mask=document_mask,
                    compiles=arguments.compile,
                )
                for document_mask in (False, True)
            )
            seconds, ratios = [], []
            for _ in range(ROUNDS):
                seconds.append(seconds_of(without))
                ratios.append(seconds_of(masked) / seconds[-1])
            heads = f"{model.num_attention_heads} on {model.num_key_value_heads}"
            ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"| {name} | {heads} | {length} | {sequences} | {statistics.median(seconds):.3f} | {ratio} |", flush=True)


def stepper(
    config: ModelConfig,
    vocabulary: int,
    length: int,
    sequences: int,
    dtype: torch.dtype,
    *,
    document_mask: bool,
    compiles: bool,
) -> Callable[[], None]:
    """A complete step: reading its sequences, forward and backward pass, clipping, update. Already called once, as warm-up."""
    random = np.random.default_rng(0)
    ends = random.integers(1, 2 * DOCUMENT_TOKENS, TOKENS // DOCUMENT_TOKENS).cumsum()
    store = TokenStore(random.integers(0, vocabulary, ends[-1], dtype=np.uint16), np.append(0, ends), "key")
    spans = np.stack([store.offsets[:-1], store.offsets[1:]], axis=1)
    data = PackedDataset(TokenStream(store, spans), length, padding=0, fingerprint="", document_mask=document_mask)
    model = DecoderLM(config, vocabulary, length)
    model.init_weights(0)
    if compiles:
        compile_model(model)
    optimizer = build_optimizer(OptimConfig(), model)

    def step() -> None:
        batch = data.__getitems__(random.integers(0, len(data) - 1, sequences).tolist())
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            loss = model_loss(model, batch)
        (loss / batch.num_targets()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    return step


def seconds_of(step: Callable[[], None]) -> float:
    """CPU seconds of a step."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
