"""docs/metrics.md names exactly the fields that runs write, and its ways to read them work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.distributed.small_runs import folder, metrics, run, small_config, status, stop_after, write_stories

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "metrics.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
[JQ] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def documented(heading: str) -> dict[str, str]:
    """Field → second column of the table under `heading`."""
    section = PAGE.partition(f"\n{heading}\n")[2].partition("\n#")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", section, re.MULTILINE))


@pytest.fixture(scope="module")
def lived(tmp_path_factory):
    """A run of two ranks that was stopped and went on, with validation, samples and recorded steps."""
    here = tmp_path_factory.mktemp("reader")
    config = small_config(
        write_stories(here / "stories.jsonl"),
        here / "runs",
        tracking__sample_tokens=4,
        profile__steps="3-4",
        run_name="default",
    )
    assert run(config, 2, before=stop_after(6)) == [0, 0]
    stopped = status(config)
    assert run(config, 2) == [0, 0]
    return config, stopped


@pytest.mark.parametrize("kind", ["train", "validation", "sample", "profile", "digest"])
def test_the_lines_of_each_kind_have_the_documented_fields(lived, kind):
    lines = metrics(lived[0], kind)
    assert lines
    assert set().union(*lines) == set.intersection(*map(set, lines)) == documented(f"### `{kind}`").keys()
    assert {name for line in lines for name, value in line.items() if isinstance(value, bool)} == {
        name for name, unit in documented(f"### `{kind}`").items() if unit == "true, false"
    }


def test_status_has_the_documented_fields(lived):
    config, stopped = lived
    assert [stopped["state"], status(config)["state"]] == ["preempted", "finished"]
    assert status(config).keys() == stopped.keys() == documented("## status.json").keys()


def test_events_have_the_documented_fields(lived):
    fields = documented("## logs/events.jsonl")
    happened = [json.loads(line) for line in (folder(lived[0]) / "logs" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in happened] == ["start", "first checkpoint", "preempted", "resume", "finished"]
    for event in happened:
        assert event.keys() == {name for name, where in fields.items() if where == "all" or f"`{event['event']}`" in where}


@pytest.mark.parametrize("example", PYTHON, ids=["digest", "pandas", "plain"])
def test_the_python_reads_it(lived, example, monkeypatch, capsys):
    if "pandas" in example:
        pytest.importorskip("pandas")
    monkeypatch.chdir(folder(lived[0]).parents[1])
    exec(example, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(shutil.which("jq") is None, reason="there is no jq here")
@pytest.mark.parametrize("command", JQ.splitlines(), ids=["rates", "best", "status"])
def test_jq_reads_it(lived, command):
    done = subprocess.run(["bash", "-c", command], cwd=folder(lived[0]).parents[1], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
