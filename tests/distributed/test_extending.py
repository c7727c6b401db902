"""The examples of docs/extending.md, as files of a user's own package: trained with, all at once, and gone on with."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_trainer.config.rules import check_config
from dist_trainer.optim.schedules import ScheduleSpec
from dist_trainer.tracking.tracker import TRACKERS
from tests.distributed.small_runs import folder, losses, metrics, run, small_config, status, stop_after

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "extending.md").read_text("utf-8")
EXAMPLES = {name: code for name, code in re.findall(r"```python\n# my_project/(\w+\.py)\n(.*?)```", PAGE, re.DOTALL)}
ROWS = {key.replace(".", "__"): name for key, name in re.findall(r"`--([\w.]+) (my_project\.\w+:\w+)`", PAGE)}
OTHERS = {"loss_file.py", "accuracy.py"}


@pytest.fixture(scope="module")
def my_project(tmp_path_factory):
    """The page's files, importable."""
    here = tmp_path_factory.mktemp("mine")
    package = here / "my_project"
    package.mkdir()
    for name, code in EXAMPLES.items():
        (package / name).write_text(code)
    sys.path.insert(0, str(here))
    sinks = dict(TRACKERS)
    yield
    sys.path.remove(str(here))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]
    TRACKERS.clear()
    TRACKERS.update(sinks)


def test_each_key_of_the_table_has_an_example():
    keys = re.findall(r"^\| `([\w.]+)` \| (?:`[A-Z]+` in |none: a list)", PAGE, re.MULTILINE)
    assert [key.replace(".", "__") for key in keys] == sorted(ROWS, key=[key.replace(".", "__") for key in keys].index)
    assert {f"{name.partition(':')[0].partition('.')[2]}.py" for name in ROWS.values()} | OTHERS == EXAMPLES.keys()
    assert PAGE.count("```python") == len(EXAMPLES)


def test_all_examples_train_and_resume_from_a_checkpoint_on_another_number_of_ranks(my_project, tmp_path):
    importlib.import_module("my_project.loss_file")  # forked ranks have its row
    callbacks = (ROWS["train__callbacks"], "my_project.accuracy:accuracy")
    changes: dict[str, Any] = {**ROWS, "train__callbacks": callbacks, "optim__learning_rate": 1e-3}
    whole, stopped = (small_config("", tmp_path / name, **changes) for name in ("whole", "stopped"))
    check_config(whole)
    assert run(whole, 2) == [0, 0]
    assert losses(whole)[-1] < losses(whole)[0] - 0.2
    square_root = importlib.import_module("my_project.schedules").inverse_square_root
    span = ScheduleSpec(whole.schedule.warmup_steps, 12, whole.schedule.min_lr_ratio)
    assert [line["lr"] for line in metrics(whole)] == [1e-3 * square_root(step, span) for step in range(12)]
    written = (folder(whole) / "losses.txt").read_text().splitlines()
    assert written == [f"{line['step']} {line['loss']}" for line in metrics(whole)]
    assert [line["step"] for line in metrics(whole, "accuracy")] == [5, 10, 12]
    assert {line["accuracy"] for line in metrics(whole, "accuracy")} <= {share / 10 for share in range(11)}
    log = (folder(whole) / "logs" / "rank-0.log").read_text()
    assert "dist_trainer.report" in log
    assert "dist_trainer.generate" not in log, "which would refuse this model"

    assert run(stopped, 2, before=stop_after(6)) == [0, 0]
    assert run(stopped, 1) == [0]
    assert losses(stopped)[:6] == losses(whole)[:6]
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_early_stopping_ends_the_run_at_the_same_step_on_any_number_of_ranks(my_project, stories, tmp_path, ranks):
    changes: dict[str, Any] = {"optim__learning_rate": 0.5, "validation__every_steps": 1, "train__max_steps": 30}
    config = small_config(stories, tmp_path, **changes, train__callbacks=(ROWS["train__callbacks"],))
    assert run(config, ranks) == [0] * ranks
    validations = losses(config, "validation")
    best = validations.index(min(validations))
    assert len(validations) == best + 1 + 3 < 30
    ended = status(config)
    assert (ended["state"], ended["step"]) == ("finished", len(validations))
    assert ended["reason"] == "no better validation loss in 3 validations"
    assert ended["best_step"] == best + 1
