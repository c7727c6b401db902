"""Inject, run, restart, compare: real processes, really killed, against the run that nothing disturbed."""

import json
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest
from safetensors.torch import load_file

from tests.end_to_end.commands import ROOT, SMALL, command, environment, lines, status

OFTEN = ["--checkpoint.every_steps", "3", "--checkpoint.keep_last", "3", "--tracking.sample_tokens", "0"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    done = command(*SMALL, *OFTEN, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    return output / "debug"


def equal_to(undisturbed, folder) -> None:
    assert [line["loss"] for line in lines(folder)] == [line["loss"] for line in lines(undisturbed)]
    assert [line["step"] for line in lines(folder)] == list(range(1, 21))
    assert [x["loss"] for x in lines(folder, "validation")] == [x["loss"] for x in lines(undisturbed, "validation")]
    ours, theirs = (load_file(f / "checkpoints" / "latest" / "model.safetensors") for f in (folder, undisturbed))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], "litter"


def logged(folder) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0


def is_saving(folder) -> bool:
    return any(folder.glob("checkpoints/.staging-step-*"))


def has_logged(folder, steps: int) -> bool:
    return logged(folder) >= steps


@contextmanager
def started(output, *more):
    """The command, running; killed at the end where it still does."""
    words = [sys.executable, "-m", "dist_trainer.train", *SMALL, *OFTEN, "--output_dir", str(output), *more]
    with subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_when(process: subprocess.Popen, happened) -> bool:
    """SIGKILL as soon as `happened()`; whether the process was still running then."""
    while process.poll() is None:
        if happened():
            process.kill()
            process.wait()
            return True
    return False


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    folder = tmp_path / "debug"
    rng = random.Random(5)
    for number in range(4):
        # Every second time inside the write of a checkpoint: as soon as a staging folder is there.
        in_a_save = partial(is_saving, folder)
        after_steps = partial(has_logged, folder, logged(folder) + rng.randint(2, 5))
        with started(tmp_path) as process:
            killed = kill_when(process, in_a_save if number % 2 else after_steps)
        assert killed or status(folder)["state"] == "finished"
        saved = sorted(folder.glob("checkpoints/step-*"))
        done = max((line["step"] for line in lines(folder)), default=0) if saved else 0
        # Nothing older than the last due save is lost, but for the one that is being written.
        assert not saved or int(saved[-1].name[5:]) >= (done // 3) * 3 - 3
    assert command(*SMALL, *OFTEN, "--output_dir", tmp_path).returncode == 0
    equal_to(undisturbed, folder)


def test_a_damaged_checkpoint_is_noticed_and_the_run_goes_one_back(undisturbed, tmp_path):
    folder = tmp_path / "debug"
    with started(tmp_path) as process:
        assert kill_when(process, lambda: (folder / "checkpoints" / "step-00000009").exists())
    newest = sorted(folder.glob("checkpoints/step-*"))[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    done = command(*SMALL, *OFTEN, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{weights} is damaged" in done.stderr
    equal_to(undisturbed, folder)


def test_with_no_checkpoint_intact_the_run_refuses_and_never_starts_over(tmp_path):
    folder = tmp_path / "debug"
    with started(tmp_path) as process:
        assert kill_when(process, lambda: (folder / "checkpoints" / "step-00000006").exists())
    for weights in folder.glob("checkpoints/step-*/model.safetensors"):
        weights.write_bytes(b"")
    before = (folder / "metrics.jsonl").read_bytes()
    for _ in range(2):
        done = command(*SMALL, *OFTEN, "--output_dir", tmp_path)
        assert done.returncode == 2
        assert "none of them is intact" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert command(*SMALL, *OFTEN, "--output_dir", tmp_path, "--checkpoint.resume", "never").returncode == 0
    assert (folder / "replaced-1" / "metrics.jsonl").read_bytes() == before


def test_a_disk_that_refuses_a_save_costs_a_warning_and_the_run_goes_on(undisturbed, tmp_path):
    limited = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
from dist_trainer.train import main
sys.exit(main(sys.argv[1:]))
"""
    words = [sys.executable, "-c", limited, *SMALL, *OFTEN, "--output_dir", str(tmp_path), "--checkpoint.max_failures", "3"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    folder = tmp_path / "debug"
    assert "step 3: the checkpoint could not be saved (EFBIG" in done.stderr, done.stderr
    assert done.returncode == 1
    assert "3 checkpoints in a row could not be saved" in status(folder)["reason"]
    assert not list(folder.glob("checkpoints/*"))
    assert command(*SMALL, *OFTEN, "--output_dir", tmp_path).returncode == 0
    equal_to(undisturbed, folder)


def test_a_second_job_on_the_folder_is_refused_by_naming_the_first(tmp_path):
    folder = tmp_path / "debug"
    with started(tmp_path, "--train.max_steps", "4000") as process:
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None
        second = command(*SMALL, *OFTEN, "--output_dir", tmp_path)
        assert second.returncode == 2
        assert f"pid {process.pid}" in second.stderr
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 75
    assert status(folder)["state"] == "preempted"


def test_a_second_signal_does_no_harm(undisturbed, tmp_path):
    folder = tmp_path / "debug"
    with started(tmp_path) as process:
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert process.returncode == 75
    assert status(folder)["state"] == "preempted"
    assert command(*SMALL, *OFTEN, "--output_dir", tmp_path).returncode == 0
    equal_to(undisturbed, folder)


def test_links_that_lead_outside_are_not_followed(undisturbed, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best").symlink_to(undisturbed / "checkpoints" / "best")
    done = command(tmp_path, "--prompt", "x", module="dist_trainer.generate")
    assert done.returncode == 2
    assert "neither a run folder" in done.stderr


def test_nothing_in_a_checkpoint_needs_unpickling(undisturbed):
    for path in (undisturbed / "checkpoints" / "latest").iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix == ".safetensors"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_while_data_are_prepared_breaks_it_off(tmp_path, number):
    text, cache, output = tmp_path / "text.jsonl", tmp_path / "cache", tmp_path / "runs"
    line = json.dumps({"text": "It is a truth universally acknowledged, that a single man must want a wife. " * 40})
    text.write_text((line + "\n") * 15_000)
    with started(output, "--data.dataset", str(text), "--data.cache_dir", str(cache)) as process:
        while not any(path.is_file() for path in cache.rglob("*")):
            assert process.poll() is None
        process.send_signal(number)
        process.wait(10)
    assert process.returncode == 75
    assert status(output / "debug")["state"] == "preempted"
    assert status(output / "debug")["reason"] == number.name
