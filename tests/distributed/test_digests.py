"""Digests of the weights in a run's files: one per step and curve, whatever the ranks, stops and strategies."""

from __future__ import annotations

import json
from typing import Any

from dist_trainer.checkpoint.digest import digest_of_folder
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.storage.manifest import read_manifest
from tests.distributed.small_runs import folder, metrics, run, small_config, status, stop_after


def digests(config: TrainingConfig) -> list[tuple[int, str]]:
    return [(line["step"], line["digest"]) for line in metrics(config, "digest")]


def without_digest_of(config: TrainingConfig, step: int) -> None:
    """As if the run had been killed before it could log it."""
    path = folder(config) / "metrics.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if (line["kind"], line["step"]) != ("digest", step)]
    assert len(kept) == len(lines) - 1
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_one_curve_has_one_digest_per_step_in_every_file_on_other_ranks_and_after_a_stop(stories, tmp_path):
    changes = {"tracking__digest_every_steps": 3, "checkpoint__every_steps": 3, "model__tie_word_embeddings": True}
    undisturbed = small_config(stories, tmp_path / "undisturbed", **changes)
    assert run(undisturbed, 1) == [0]
    assert [step for step, _ in digests(undisturbed)] == [3, 6, 9, 12]

    stopped = small_config(stories, tmp_path / "stopped", **changes)
    assert run(stopped, 2, before=stop_after(6)) == [0, 0]
    assert (status(stopped)["digest_step"], status(stopped)["digest"]) == digests(undisturbed)[1]
    without_digest_of(stopped, 6)
    assert run(stopped, 1) == [0]
    assert digests(stopped) == digests(undisturbed)

    for step, digest in digests(undisturbed):
        for config in (undisturbed, stopped):
            checkpoint = folder(config) / "checkpoints" / f"step-{step:08d}"
            assert read_manifest(checkpoint)["weights_digest"] == digest_of_folder(checkpoint) == digest
    assert (status(stopped)["digest_step"], status(stopped)["digest"]) == digests(undisturbed)[-1]


def test_with_0_only_checkpoints_have_one(stories, tmp_path):
    config = small_config(stories, tmp_path, tracking__digest_every_steps=0, train__max_steps=2)
    assert run(config, 1) == [0]
    assert digests(config) == []
    last = read_manifest((folder(config) / "checkpoints" / "latest").resolve())
    assert (status(config)["digest_step"], status(config)["digest"]) == (2, last["weights_digest"])
