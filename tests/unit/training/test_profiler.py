"""comm_ms and comm_exposed_ms of traces that are made by hand; what of the memory's history is written, without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_trainer.training.profiler import exchange_cost, write_memory_history
from dist_trainer.training.step import is_profiling


def span(category: str, name: str, begin_ms: float, end_ms: float, **args: Any) -> dict[str, Any]:
    ts, dur = 1000 * begin_ms, 1000 * (end_ms - begin_ms)
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": args}


def on_cpu(*spans: dict[str, Any]) -> list[dict[str, Any]]:
    backward = [span("cpu_op", "autograd::engine::evaluate_function: AddmmBackward0", 10, 20)]
    return [span("user_annotation", "step 5", 0, 30), *backward, *spans]


def cost(events: list[dict[str, Any]]) -> tuple[float, float]:
    found = exchange_cost(events)
    assert found is not None
    return found


def test_on_cpu_what_comes_after_the_last_node_of_the_backward_pass_is_exposed():
    assert cost(on_cpu(span("user_annotation", "gloo:all_reduce", 12, 24))) == pytest.approx((12, 4))


def test_buckets_that_are_under_way_at_the_same_time_count_once():
    both = [span("user_annotation", "gloo:all_reduce", 12, 18), span("user_annotation", "gloo:all_reduce", 15, 23)]
    assert cost(on_cpu(*both)) == pytest.approx((11, 3))


def test_handing_a_bucket_over_is_no_computing():
    reduced = span("user_annotation", "gloo:all_reduce", 12, 16)
    assert cost(on_cpu(reduced, span("cpu_op", "c10d::allreduce_", 11, 14))) == pytest.approx((4, 2))


@pytest.mark.parametrize("name", ["gloo:broadcast", "forward", "gloo:barrier"])
def test_other_collectives_and_ranges_are_no_exchange(name):
    assert cost(on_cpu(span("user_annotation", name, 12, 28))) == (0, 0)


def test_what_starts_outside_of_a_step_is_no_exchange_of_gradients():
    assert cost(on_cpu(span("user_annotation", "gloo:all_reduce", 31, 35))) == (0, 0)


def test_it_is_a_mean_over_the_steps():
    second = [span("user_annotation", "step 6", 40, 60), span("user_annotation", "gloo:all_reduce", 50, 52)]
    assert cost([*on_cpu(span("user_annotation", "gloo:all_reduce", 12, 24)), *second]) == pytest.approx((7, 3))


def test_on_a_gpu_nccl_s_kernels_count_by_when_they_were_launched_and_are_hidden_by_other_kernels():
    events = [
        span("user_annotation", "step 5", 0, 10),
        span("cpu_op", "aten::mm", 0, 9),
        span("cuda_runtime", "cudaLaunchKernel", 5, 5.1, correlation=1),
        span("cuda_runtime", "cudaLaunchKernelExC", 6, 6.1, correlation=2),
        span("cuda_runtime", "cudaLaunchKernelExC", 11, 11.1, correlation=3),
        span("kernel", "ampere_bf16_gemm", 20, 30, correlation=1),
        span("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", 25, 34, correlation=2),
        span("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgs)", 40, 41, correlation=3),
        span("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 31, 33),
    ]
    assert cost(events) == pytest.approx((9, 4))


def test_a_trace_without_a_step_has_no_cost():
    assert exchange_cost([span("cpu_op", "aten::mm", 0, 1), {"ph": "M", "name": "process_name"}]) is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_history_that_cannot_be_written_is_no_longer_kept_and_leaves_no_file(tmp_path, monkeypatch, fails):
    kept = [True]

    def dump(path: str) -> None:
        Path(path).write_bytes(b"half of it")
        if fails:
            raise OSError("no space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *, enabled: kept.append(bool(enabled)))
    with nullcontext() if not fails else pytest.raises(OSError, match="no space"):
        write_memory_history(tmp_path / "profile" / "steps-3-4-rank0.memory")
    assert kept == [True, False]
    names = [path.name for path in (tmp_path / "profile").iterdir()]
    assert names == ([] if fails else ["steps-3-4-rank0.memory.pickle"])


def test_a_torch_that_does_not_say_whether_it_profiles_is_taken_to_do_so(monkeypatch):
    assert not is_profiling()
    monkeypatch.delattr(torch.autograd, "_profiler_enabled")
    assert is_profiling()
