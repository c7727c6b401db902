"""A hand-written training loop, with nothing around it.

Flags, joined by commas: `compiled` (torch.compile of the whole model), `per-block` (of each block), `lean` (DecoderLM's
own loss, which never holds all logits; without it F.cross_entropy of float32 logits), `resumes` (from its own checkpoint).
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contestants.bare_loop import BareLoop
from benchmarks.contestants.model import adamw, build
from benchmarks.stopwatch import Stopwatch, workload_here, write_result


def main(flags: set[str]) -> None:
    workload = workload_here()
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = raw = build(workload, device)
    if "per-block" in flags:
        for part in raw.compile_units:
            part.compile(dynamic=False)
    if "compiled" in flags:
        raw.compile(dynamic=False)
    if workload.ranks > 1:
        dist.init_process_group()
        model = DistributedDataParallel(raw, gradient_as_bucket_view=True)
    optimizer = adamw(raw)
    saved = workload.folder / f"bare-{rank}.pt"
    if "resumes" in flags:
        state = torch.load(saved, map_location=device)
        raw.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    stopwatch = Stopwatch(workload)
    stopwatch.watch(optimizer)
    loop = BareLoop(model, optimizer, device, workload.dtype, lean="lean" in flags)
    loss = torch.zeros(())
    for step, sequences in enumerate(workload.sequences(rank), start=1):
        loss = loop.step(sequences)
        if step == workload.save_at:
            torch.save({"model": raw.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    write_result(stopwatch, float(loss.detach()))
    if workload.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(set(filter(None, sys.argv[1].split(","))) if len(sys.argv) > 1 else set())
