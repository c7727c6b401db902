"""profile.steps: a trace that Perfetto opens, what the exchange costs, and a run that is otherwise the same."""

from __future__ import annotations

import gzip
import json
import pathlib

import pytest

from tests.distributed.small_runs import changed, folder, losses, metrics, run, same_weights, small_config, status, stop_after


def trace(config, name):
    return json.loads(gzip.decompress((folder(config) / "profile" / name).read_bytes()))["traceEvents"]


def ranges(events):
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def files(config):
    path = folder(config) / "profile"
    return sorted(file.name for file in path.iterdir()) if path.exists() else []


def said(config, rank=0):
    return (folder(config) / "logs" / f"rank-{rank}.log").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_profiled_run_is_the_same_run_and_leaves_a_trace_of_each_rank(stories, tmp_path, undisturbed, ranks):
    plain, config = undisturbed(ranks, {}), small_config(stories, tmp_path, profile__steps="5-6")
    assert run(config, ranks) == [0] * ranks
    assert losses(config) == losses(plain)
    assert losses(config, "validation") == losses(plain, "validation")
    assert same_weights(config, plain)
    assert files(plain) == []
    assert files(config) == [f"steps-5-6-rank{rank}.json.gz" for rank in range(ranks)]
    for rank in range(ranks):
        names = ranges(trace(config, f"steps-5-6-rank{rank}.json.gz"))
        assert [name for name in names if name.startswith("step ")] == ["step 5", "step 6"]
        # Two steps of as many micro-batches as make 8 sequences.
        assert names.count("backward") == 2 * 4 // ranks
        assert names.count("forward") >= names.count("backward")
        assert names.count("optimizer") == names.count("clip gradients") == 2
        assert names.count("data") == 2
        assert "validation" in names
    if ranks == 1:
        assert metrics(config, "profile") == []
    else:
        the_cost_of_the_exchange_is_logged_and_written(config)


def the_cost_of_the_exchange_is_logged_and_written(config):
    (line,) = metrics(config, "profile")
    assert (line["first_step"], line["step"]) == (5, 6)
    assert 0 < line["comm_exposed_ms"] <= line["comm_ms"]
    step_ms = 1000 * max(train["step_seconds"] for train in metrics(config))
    assert line["comm_ms"] < 2 * step_ms
    assert f"comm_ms {line['comm_ms']:.2f}" in said(config)
    assert f"comm_exposed_ms {line['comm_exposed_ms']:.2f}" in said(config)


def test_steps_outside_of_the_run_are_reported_in_one_sentence(stories, tmp_path):
    past = small_config(stories, tmp_path / "past", profile__steps="50-60")
    assert run(past, 1) == [0]
    assert "profile.steps: 50-60, but the run covers steps 1 to 12; nothing is recorded" in said(past)
    assert files(past) == []
    part = small_config(stories, tmp_path / "part", profile__steps="11-15")
    assert run(part, 1) == [0]
    assert "profile.steps: 11-15, but the run covers steps 1 to 12; only steps 11 to 12 will be recorded" in said(part)
    assert files(part) == ["steps-11-12-rank0.json.gz"]


def test_a_run_that_is_stopped_writes_what_it_has_and_resumes_with_other_steps_or_none(stories, tmp_path, undisturbed):
    plain, config = undisturbed(1, {}), small_config(stories, tmp_path, profile__steps="5-8")
    run(config, 1, before=stop_after(6))
    assert files(config) == ["steps-5-6-rank0.json.gz"]
    early = changed(config, profile__steps="9-10")
    run(early, 1, before=stop_after(8))
    assert "profile.steps: the run has ended at step 8, before any of them" in said(config)
    assert run(changed(config, profile__steps=None), 1) == [0]
    assert status(config)["state"] == "finished"
    assert losses(config) == losses(plain)
    assert same_weights(config, plain)


def test_a_trace_that_cannot_be_written_costs_a_warning(stories, tmp_path):
    config = small_config(stories, tmp_path, profile__steps="5")

    def block(trainer):
        (pathlib.Path(trainer.config.output_dir) / trainer.config.run_name / "profile").write_text("a file stands here")

    assert run(config, 1, before=block) == [0]
    assert "profile: step 5 could not be recorded" in said(config)
    assert status(config)["state"] == "finished"
