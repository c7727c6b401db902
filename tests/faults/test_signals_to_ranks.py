"""Two ranks, and a signal when it is least welcome: all save that very step, leave soon, and nothing is lost. Or a compiler."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from dist_trainer.checkpoint import manager
from dist_trainer.config.schema import PrecisionConfig
from tests.distributed.small_runs import (
    at_each_validation_batch,
    command,
    folder,
    losses,
    on_rank,
    run,
    same_weights,
    small_config,
    status,
)
from tests.faults.faults import before_each_call
from tests.faults.processes import children_of, wait_until
from tests.pace import allowed

SECONDS_TO_LEAVE = 10


def receive(number, *, note: Path) -> None:
    """Twice, as from a user who has no patience; and when it was. The second comes later, or the two might merge."""
    if not note.exists():
        note.write_text(json.dumps(time.time()))
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        os.kill(os.getpid(), number)


def during_validation(number, note):
    return at_each_validation_batch(lambda: receive(number, note=note))


def during_a_save(number, note):
    trap = before_each_call(lambda: receive(number, note=note), manager, "write_training_state")
    return lambda trainer: trap()


def during_compilation(number, note):
    """As soon as the compiler for C++ has been started."""

    def lay(trainer):
        def watch():
            wait_until(lambda: bool(children_of(os.getpid())))
            receive(number, note=note)

        threading.Thread(target=watch, daemon=True).start()

    return lay


@pytest.mark.parametrize(
    ("when", "rank", "number"), [(during_validation, 1, signal.SIGTERM), (during_a_save, 0, signal.SIGINT)]
)
def test_a_signal_during(when, rank, number, stories, undisturbed_by_two, tmp_path):
    undisturbed = undisturbed_by_two
    config, note = small_config(stories, tmp_path), tmp_path / "when.json"
    assert command(config, 2, before=on_rank(rank, when(number, note))) == [0, 0]
    assert time.time() - json.loads(note.read_text()) < allowed(SECONDS_TO_LEAVE)
    assert status(config)["state"] == "preempted"
    assert status(config)["reason"] == number.name
    assert os.readlink(folder(config) / "checkpoints" / "latest") == f"step-{status(config)['step']:08d}"
    assert len(losses(config)) == status(config)["step"] < 12
    assert run(config, 2) == [0, 0]
    for kind in ("train", "validation"):
        assert losses(config, kind) == losses(undisturbed, kind)
    assert same_weights(config, undisturbed)
    assert status(config)["lost_steps"] == 0


@pytest.mark.slow  # by the real compiler; below, by one that takes no time
@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for the CPU by g++, which is not here")
def test_a_signal_during_compilation_breaks_it_off(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # nothing is compiled already
    config, note = (
        small_config(stories, tmp_path, precision=PrecisionConfig(dtype="fp32", compile=True)),
        tmp_path / "when.json",
    )
    assert command(config, 1, before=on_rank(0, during_compilation(signal.SIGTERM, note))) == [75]
    assert time.time() - json.loads(note.read_text()) < allowed(SECONDS_TO_LEAVE)
    assert status(config)["state"] == "preempted"
    assert status(config)["step"] == 0


def compile_by(backend, monkeypatch):
    """All that is compiled from now on."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **named: compile_module(module, backend=backend, **named))


@pytest.mark.filterwarnings("ignore")  # those of the compiler
@pytest.mark.parametrize("packing", [True, False])
def test_nothing_is_compiled_once_training_has_started(stories, tmp_path, monkeypatch, packing):
    """Neither validation, with its smaller last block, nor samples: there a signal could not break it off."""
    note, begun = tmp_path / "compiled.txt", []

    def compile_and_note(graph, inputs):
        with note.open("a") as file:
            file.write("late\n" if begun else "early\n")
        return graph.forward

    compile_by(compile_and_note, monkeypatch)
    compiled = PrecisionConfig(dtype="fp32", compile=True)
    config = small_config(stories, tmp_path, precision=compiled, tracking__sample_tokens=4, data__packing=packing)
    assert command(config, 1, before=lambda trainer: before_each_step(trainer, lambda: begun.append(1))) == [0]
    assert set(note.read_text().split()) == {"early"}
    assert len(losses(config, "validation")) == 3


def before_each_step(trainer, act):
    train_step = trainer.train_step

    def act_then_step(*arguments):
        act()
        return train_step(*arguments)

    trainer.train_step = act_then_step


@pytest.mark.filterwarnings("ignore")  # those of the compiler
def test_a_signal_while_validation_is_compiled_breaks_it_off(stories, tmp_path, monkeypatch):
    note = tmp_path / "when.json"

    def compile_for_long(graph, inputs):
        if not torch.is_grad_enabled():
            receive(signal.SIGTERM, note=note)
            threading.Event().wait()  # until it is broken off
        return graph.forward

    compile_by(compile_for_long, monkeypatch)
    config = small_config(stories, tmp_path, precision=PrecisionConfig(dtype="fp32", compile=True))
    assert command(config, 1) == [75]
    assert time.time() - json.loads(note.read_text()) < allowed(SECONDS_TO_LEAVE)
    assert (status(config)["state"], status(config)["step"]) == ("preempted", 0)


def test_a_signal_while_data_are_prepared_leaves_at_once(stories, tmp_path, monkeypatch):
    from dist_trainer.data import store_building

    write, note = store_building._write_store, tmp_path / "when.json"

    def write_and_receive(*arguments):
        receive(signal.SIGUSR1, note=note)
        return write(*arguments)

    monkeypatch.setattr(store_building, "_write_store", write_and_receive)
    monkeypatch.setenv("DIST_TRAINER_CACHE", str(tmp_path / "cache"))  # nothing is prepared already
    config = small_config(stories, tmp_path)
    assert command(config, 2) == [0, 0]
    assert time.time() - json.loads(note.read_text()) < allowed(SECONDS_TO_LEAVE)
    assert status(config)["state"] == "preempted"
    assert status(config)["reason"] == "SIGUSR1"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".bin", ".npy")]
    assert command(config, 2) == [0, 0]
    assert status(config)["state"] == "finished"
