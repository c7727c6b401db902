"""W&B's own agent, without its server, takes the example sweep through two runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_trainer.tracking.sink import LogCursor
from tests.end_to_end.commands import ROOT, lines, status


@pytest.mark.slow
def test_two_runs_of_an_agent_train_in_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.wandb_agent import Agent

    monkeypatch.chdir(tmp_path)
    names = {"WANDB_SWEEP_ID": "swp00001", "WANDB_PROJECT": "books", "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    # Set by the agent; here, so that they go again with the test.
    names |= {"WANDB_DIR": str(tmp_path), "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    for name, value in {**names, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    agent = Agent(None, None, sweep_id="swp00001")
    command = yaml.safe_load((ROOT / "configs/sweeps/learning_rate.yaml").read_text())["command"]
    agent._sweep_command = [*command[:4], f"--config={ROOT}/configs/debug.yaml", *command[4:]]
    for number, ties in enumerate((False, True)):
        chosen: dict[str, Any] = {"optim.learning_rate": 0.001 * (number + 1), "model.tie_word_embeddings": ties}
        chosen |= {"train.max_steps": 2, "train.epochs": None, "optim.betas": [0.9, 0.98], "tracking.log_every_steps": 1}
        arguments = {name: {"value": value} for name, value in chosen.items()}
        agent._command_run({"type": "run", "run_id": f"agent{number}", "program": "", "args": arguments})
        assert agent._run_processes[f"agent{number}"].wait() == 0
        folder = tmp_path / f"runs/sweep/lr-agent{number}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["optim"]["learning_rate"], config["model"]["tie_word_embeddings"]) == (0.001 * (number + 1), ties)
        assert [line["step"] for line in lines(folder)] == [1, 2]
        assert status(folder)["state"] == "finished"
        assert (folder / "wandb/run_id").read_text().strip() == f"agent{number}", "the sweep's own id"
        assert LogCursor.read(folder, "wandb").step == 2
