"""A training loop as one writes it by hand, with nothing around it.

Flags, joined by commas: `compiled` (torch.compile of the whole model), `per-block` (of each block), `lean` (the loss of
DecoderLM itself, which never holds all logits; without it F.cross_entropy of float32 logits), `goes-on` (from what it saved).
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks import workloads
from benchmarks.contestants.model import adamw, build
from benchmarks.stopwatch import Stopwatch, workload_here, write_result


def main(flags: set[str]) -> None:
    workload = workload_here()
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = raw = build(workload, device)
    if "per-block" in flags:
        for part in raw.compiled_parts:
            part.compile(dynamic=False)
    if "compiled" in flags:
        raw.compile(dynamic=False)
    if workload.ranks > 1:
        dist.init_process_group()
        model = DistributedDataParallel(raw, gradient_as_bucket_view=True)
    optimizer = adamw(raw)
    saved = workload.folder / f"bare-{rank}.pt"
    if "goes-on" in flags:
        state = torch.load(saved, map_location=device)
        raw.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    stopwatch = Stopwatch(workload)
    stopwatch.watch(optimizer)
    autocast = contextlib.nullcontext
    if workload.dtype != "fp32":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[workload.dtype]

        def autocast() -> torch.autocast:
            return torch.autocast(device.type, dtype=dtype)

    scaler = torch.amp.GradScaler(device.type, enabled=workload.dtype == "fp16")
    loss = torch.zeros(())
    for step, rows in enumerate(workload.rows(rank), start=1):
        rows = torch.from_numpy(rows.astype("int64")).to(device, non_blocking=True)
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with autocast():
            if "lean" in flags:
                loss = model(tokens, targets) / targets.numel()
            else:
                logits = model(tokens)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(raw.parameters(), workloads.MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if step == workload.save_at:
            torch.save({"model": raw.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    write_result(stopwatch, float(loss.detach()))
    if workload.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(set(filter(None, sys.argv[1].split(","))) if len(sys.argv) > 1 else set())
