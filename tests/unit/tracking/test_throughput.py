"""Tokens per second, MFU, waits and stalls, by a clock of the test's."""

from __future__ import annotations

import pytest
import torch

from dist_trainer.distributed.context import DistributedContext
from dist_trainer.tracking.throughput import Throughput, peak_flops


def test_throughput_leaves_out_what_is_paused():
    now = [0.0]
    throughput = Throughput(DistributedContext.single(), dtype="fp32", clock=lambda: now[0])
    throughput.start(step=10, tokens=1000)
    now[0] = 3.5
    with throughput.paused:
        now[0] = 100.0
    now[0] = 100.5
    measured = throughput.measure(step=12, tokens=1800)
    assert measured["tokens_per_second"] == 200
    assert measured["step_seconds"] == 2
    assert measured["mfu"] is None


def test_saves_since_the_last_measurement_are_summed_up_and_without_one_there_is_no_stall():
    now = [0.0]
    throughput = Throughput(DistributedContext.single(), dtype="fp32", clock=lambda: now[0])
    for seconds in (0.25, 0.5):
        with throughput.saving:
            now[0] += seconds
    assert throughput.measure(step=1, tokens=1)["checkpoint_stall_ms"] == 750
    assert throughput.measure(step=2, tokens=2)["checkpoint_stall_ms"] is None
    with throughput.saving:
        pass
    assert throughput.measure(step=3, tokens=3)["checkpoint_stall_ms"] == 0


def test_peaks_are_known_by_name_and_unknown_otherwise():
    assert peak_flops("NVIDIA H200", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp16") == 312e12
    assert peak_flops("Tesla T4", "bf16") is None
    assert peak_flops("some other device", "bf16") is None
    assert peak_flops("NVIDIA H200", "fp32") is None
    # Names that contain that of another device.
    for name in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops(name, "bf16") is None, name


def test_mfu_is_computed_as_the_docs_say(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dist_trainer.tracking.throughput.device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("dist_trainer.tracking.throughput.peak_memory_bytes", lambda device: 7)
    world = DistributedContext(world_size=4, device=torch.device("cuda", 0))
    throughput = Throughput(world, dtype="bf16", flops_per_token=1e9, clock=lambda: now[0])
    with throughput.waiting_for_data:
        now[0] = 0.5
    now[0] = 2.0
    measured = throughput.measure(step=2, tokens=1_000_000)
    assert measured["tokens_per_second"] == 500_000
    assert measured["mfu"] == pytest.approx(500_000 * 1e9 / (4 * 312e12))
    assert (measured["data_seconds"], measured["peak_memory_bytes"]) == (0.25, 7)
