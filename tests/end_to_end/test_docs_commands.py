"""Every command in docs/ and slurm/README.md runs, in the order of its page, or says what it needs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.commands import ROOT
from tests.end_to_end.documented_commands import NEEDS, cheap, commands_of, have_runs_of, run, runnable, stand_in

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "slurm" / "README.md", ROOT / "benchmarks" / "README.md"]
ELSEWHERE = {
    "docs/evaluating.md": "tests/distributed/test_evaluating.py::"
    "test_the_commands_of_the_page_give_the_same_number_on_any_number_of_ranks",
    "docs/fine_tuning.md": "tests/end_to_end/test_fine_tuning.py::test_every_command_runs",
    "docs/fine_tuning_data.md": "tests/end_to_end/test_fine_tuning_data.py::"
    "test_a_run_on_conversations_from_a_file_to_samples_and_measures",
    "docs/metrics.md": "tests/distributed/test_documented_metrics.py::test_jq_reads_it",
}
"""Page → the test that reads its commands from it."""
PYTHON = {
    "docs/extending.md": "tests/distributed/test_extending.py::"
    "test_all_examples_train_and_resume_from_a_checkpoint_on_another_number_of_ranks",
    "docs/fine_tuning.md": "tests/end_to_end/test_fine_tuning.py::test_a_model_that_was_given_more_tokens_is_one_to_start_from",
    "docs/fine_tuning_data.md": "tests/end_to_end/test_fine_tuning_data.py::"
    "test_a_run_on_conversations_from_a_file_to_samples_and_measures",
    "docs/library.md": "tests/distributed/test_library.py::test_the_programs_of_the_page_run",
    "docs/metrics.md": "tests/distributed/test_documented_metrics.py::test_the_python_reads_it",
}
"""Page → the test that runs the Python that it shows; the last example of library.md, which needs a run, is run here."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


HERE = {name_of(page): found for page in PAGES if name_of(page) not in ELSEWHERE and (found := runnable(commands_of(page)))}


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that readers have at hand."""
    folder = stand_in(tmp_path_factory.mktemp("origin"))
    run(cheap("python -m dist_trainer.train"), folder)
    return folder / "runs" / "default"


@pytest.mark.parametrize("page", HERE)
def test_the_commands_of_the_page_run_one_after_the_other(page: str, origin: Path, tmp_path: Path) -> None:
    folder = stand_in(tmp_path)
    for command in HERE[page]:
        have_runs_of(command, folder, origin)
        run(cheap(command), folder)


def test_what_library_md_takes_back_from_a_run(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    back = (ROOT / "docs" / "library.md").read_text("utf-8").partition("## Loading a trained model")[2]
    [example] = re.findall(r"```python\n(.*?)```", back, re.DOTALL)
    monkeypatch.chdir(origin.parents[1])
    found: dict[str, Any] = {}
    exec(example, found)
    assert found["model"].vocabulary_size == len(found["tokenizer"]) == 4096


def test_every_page_that_shows_python_has_a_test_that_runs_it() -> None:
    assert {name_of(page) for page in [*PAGES, ROOT / "README.md"] if "```py" in page.read_text("utf-8")} == PYTHON.keys()
    for page, test in PYTHON.items():
        file, _, function = test.partition("::")
        source = (ROOT / file).read_text("utf-8")
        assert f"def {function}(" in source
        assert Path(page).name in source
        assert "exec" in source or "write_text" in source, "it runs what it reads"


@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_with_a_test_of_its_own_is_read_by_it(page: str) -> None:
    file, _, function = ELSEWHERE[page].partition("::")
    source = (ROOT / file).read_text("utf-8")
    assert f"def {function}(" in source
    assert Path(page).name in source
    assert commands_of(ROOT / page)


def test_no_command_hides_outside_of_bash_blocks() -> None:
    """Shown in another way, it would be run by no test. The contract in architecture.md has forms of commands."""
    shown = re.compile(r"^( {4}|```(?!bash)\w*\n)(python -m|torchrun|sbatch|make|launch/\w+\.sh) ", re.MULTILINE)
    assert [name_of(page) for page in PAGES if shown.search(page.read_text("utf-8"))] == ["docs/architecture.md"]


def test_marks_are_explained_to_readers() -> None:
    explained = (ROOT / "docs" / "README.md").read_text("utf-8")
    used = {found[0] for page in PAGES for _, remark in commands_of(page) if (found := NEEDS.search(remark))}
    assert used
    assert [mark for mark in sorted(used) if f"`# {mark}`" not in explained] == []


def test_the_files_that_commands_name_exist() -> None:
    words = {word for page in PAGES for command, _ in commands_of(page) for word in shlex.split(command)}
    named = {word for word in words if word.startswith(("configs/", "launch/", "slurm/", "tests/"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
