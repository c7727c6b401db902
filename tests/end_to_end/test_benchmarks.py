"""The benchmarks run, and all contestants do the same work (compare refuses other losses)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import compare, gpu
from benchmarks.compare import BASE, CONTESTANTS, Contestant, chosen, measure, run, table
from benchmarks.workloads import SIZES, Workload
from tests.architecture.sources import REPOSITORY


def bench(*words: str) -> str:
    command = [sys.executable, "-m", *words]
    found = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": ""})
    assert found.returncode == 0, found.stderr
    return found.stdout


def results(*seconds):
    same = {"cpu_seconds": 1.0, "peak_bytes": 2, "seconds_to_first_step": 3.0, "loss": 1.0}
    return [{"step_seconds": second, **same} for second in seconds]


def test_the_table_holds_ratios_round_by_round(tmp_path):
    made = table({BASE: results(1.0, 2.0, 4.0), "ours": results(0.5, 4.0, 4.0)}, Workload(SIZES["overhead"], tmp_path))
    assert "| ours | 1.000 (0.500 to 2.000) | 1.000 (1.000 to 1.000) |" in made


def test_unknown_contestants_are_rejected_by_name():
    with pytest.raises(ValueError, match="no contestant 'theirs'; there are bare; "):
        chosen("theirs")
    assert set(chosen(None)) <= set(CONTESTANTS)


def test_a_trainer_that_fails_is_reported_and_keeps_its_rounds_while_the_others_continue(tmp_path, monkeypatch):
    runs = []

    def fails_in_round_2(contestant, *_, **__):
        runs.append(contestant.module)
        if runs.count("ours") == 2 and contestant.module == "ours":
            raise SystemExit("ours failed:\nCUDA out of memory")
        return results(1.0)[0]

    monkeypatch.setattr(compare, "prepare", lambda _: None)
    monkeypatch.setattr(compare, "run", fails_in_round_2)
    both, workload = {name: CONTESTANTS[name] for name in (BASE, "ours")}, Workload(SIZES["overhead"], tmp_path)
    failures: dict[str, str] = {}
    found = measure(both, workload, rounds=3, threads=1, rehearses=False, failures=failures)
    assert {name: len(rounds) for name, rounds in found.items()} == {BASE: 3, "ours": 1}
    assert failures == {"ours": "ours failed:\nCUDA out of memory"}
    assert "| ours | 1.000 (1.000 to 1.000) |" in table(found, workload)
    runs.clear()
    with pytest.raises(SystemExit, match="CUDA out of memory"):
        measure(both, workload, rounds=3, threads=1, rehearses=False)


def test_a_run_past_its_limit_is_killed(tmp_path):
    with pytest.raises(SystemExit, match="ours was killed, not done within 0 s"):
        run(Contestant("ours", ()), Workload(SIZES["overhead"], tmp_path), 1, limit=0.01)


def test_an_entry_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    def out_of_disk_at_124m(contestants, workload, **_):
        if workload.size == SIZES["124m-gpu"]:
            raise OSError("No space left on device")
        return {name: results(0.5) for name in contestants}

    monkeypatch.setattr(gpu, "measure", out_of_disk_at_124m)
    assert gpu.main(["--out", str(tmp_path / "table.md")]) == 1
    made = capsys.readouterr().out
    assert made.startswith("124m-gpu: OSError: No space left on device\n\n")
    assert "- ours, compiled: 32,768 tokens/s, 0.00 GiB" in made
    assert (tmp_path / "table.md").read_text() == made


@pytest.mark.slow
@pytest.mark.timeout(900, method="signal")
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_contestants_that_are_installed_do_the_same_work(ranks):
    made = bench("benchmarks.compare", "--size", "overhead", "--steps", "6", "--rounds", "1", "--save", "--ranks", str(ranks))
    assert all(f"| {name} |" in made for name in chosen(None))


@pytest.mark.slow
@pytest.mark.timeout(900, method="signal")
def test_the_gpu_script_runs_in_its_smallest_size_on_whatever_is_here(tmp_path):
    made = bench("benchmarks.gpu", "--smallest", "--out", str(tmp_path / "table.md"))
    assert "- ours, compiled, fp16 against ours, compiled: " in made
    assert "Size 1b-gpu, bf16, " in made
    assert (tmp_path / "table.md").read_text() == made


@pytest.mark.slow
def test_saving_is_measured_against_torch_save():
    assert "| ours: training stands still |" in bench("benchmarks.saving_speed", "--size", "overhead", "--rounds", "1")


@pytest.mark.slow
def test_digests_are_measured_against_the_same_run_without():
    made = bench("benchmarks.digest_cost", "--size", "overhead", "--every", "3", "--pairs", "2")
    assert "| tokens/s with digests, of those without | " in made


@pytest.mark.slow
def test_resuming_is_measured_against_a_script_that_loads():
    assert "ours against the script: " in bench("benchmarks.restarting", "--size", "overhead", "--rounds", "1")


@pytest.mark.slow
@pytest.mark.timeout(300, method="signal")
def test_own_cost_is_measured_step_by_step_in_turn_with_the_bare_loop():
    made = bench("benchmarks.own_cost", "--steps", "6", "--rounds", "1", "--only", "bare, lean; ours")
    assert "| bare, lean | " in made
    assert "| ours | " in made
