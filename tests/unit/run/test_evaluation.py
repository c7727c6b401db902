"""What is written of lm_eval's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_trainer.run.evaluation import write_results


def test_results_are_written_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval's settings repeat the environment's paths and arguments, among them URLs with tokens."""
    monkeypatch.setenv("MY_TOKEN", "open-up-now")
    results = {
        "results": {"letters": {"acc": 0.5}},
        "config": {"args": ["https://open-up-now@host", {"a": "open-up-now"}]},
    }
    file = write_results(tmp_path, tmp_path / "checkpoints" / "step-00000004", results)
    assert file.parent == tmp_path / "evaluations"
    assert "open-up-now" not in file.read_text()
    assert json.loads(file.read_text()) == {
        "results": {"letters": {"acc": 0.5}},
        "config": {"args": ["https://***@host", {"a": "***"}]},
    }
