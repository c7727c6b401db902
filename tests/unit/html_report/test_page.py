"""report.html: its contents for runs of any length, complete or damaged; and that everybody can read it."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import pytest

from dist_trainer import report
from dist_trainer.html_report.charts import (
    MAX_POINTS,
    MAX_RUNS_WITH_RAW_LOSS,
    Chart,
    Line,
    axes_of,
    charts,
    clipped_top,
    figure,
    skipped_steps,
    smoothed,
    style_of,
    thin,
)
from dist_trainer.html_report.page import SHARE_OF_TIME, STYLE, ReportTracker, html_report, labels_of
from dist_trainer.html_report.sections import SAMPLES_SHOWN, results, spread
from dist_trainer.html_report.timeline import numbered_marks, timeline
from dist_trainer.tracking.goodput import Goodput, goodput
from dist_trainer.tracking.run_reader import RunHistory, SampleText, read_run
from tests.unit.tracking.runs import train_line, validation_line, write_metrics, write_run


def test_it_is_one_page_without_network_and_escapes_everything(tmp_path):
    page = html_report([read_run(write_run(tmp_path / "a&b"))])
    assert "<td>&lt;b&gt;</td>" in page
    assert "<td><b>" not in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "http" not in page
    assert '<noscript><p class="note">The charts need JavaScript' in page
    assert "a&amp;b" in page
    assert "a&b" not in page
    assert page.count('<figure class="chart"') == 7
    assert len(page) < 100_000


def test_restarts_and_signals_are_marked_and_described(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    texts = ["stopped by SIGTERM at step 15, saved; restarted 0.5 s later from step 15"]
    texts.append("killed without a message; restarted from step 25, 2 steps repeated")
    assert [(mark.x, mark.number, mark.text) for mark in numbered_marks([run])] == [
        (15.0, 1, texts[0]),
        (25.0, 2, texts[1]),
    ]
    page = html_report([run])
    assert all(f'<li value="{number}">step' in page for number in (1, 2))
    assert all(text in page for text in texts)


def test_an_end_without_a_restart_is_described_too():
    events = [
        {"event": "start", "step": 0, "time": 1.0},
        {"event": "failed", "step": 7, "time": 2.0, "reason": "diverged: <x>"},
    ]
    assert list(timeline(events)) == [(7, "failed at step 7: diverged: <x>")]
    assert list(timeline([*events, {"event": "start", "step": 0, "time": 3.0}])) == [
        (0, "failed at step 7: diverged: <x>; restarted from step 0")
    ]
    assert list(timeline([{"event": "resume", "step": 9, "time": 1.0}])) == [(9, "started from step 9 of another run")]


ONE_RUN = {
    "Loss": ["training", "smoothed", "validation"],
    "Learning rate": ["learning rate"],
    "Peak memory": ["peak memory"],
    **{title: ["measured", "smoothed"] for title in ("Gradient norm", "Throughput", "MFU", "Step time", "Waiting for data")},
}
"""The lines of each chart."""


def test_each_measurement_has_a_chart_with_its_values(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    found = {chart.title: chart.lines for chart in charts([run], ["run"])}
    assert {title: [line.label for line in lines] for title, lines in found.items()} == ONE_RUN
    assert list(found["Loss"][2].y) == list(run.validation["loss"])
    assert list(found["Gradient norm"][0].y) == list(run.train["grad_norm"])
    several = {chart.title: [line.label for line in chart.lines] for chart in charts([run, run], ["one", "two"])}
    assert several["Loss"] == [
        f"{label}: {kind}" for label in ("one", "two") for kind in ("training", "smoothed", "validation")
    ]
    assert all(several[title] == ["one", "two"] for title in ONE_RUN if title != "Loss")


def test_a_skipped_update_is_marked_as_such_also_if_its_loss_is_finite(tmp_path):
    """As in fp16, where only scaled gradients overflow."""
    write_metrics(tmp_path, [train_line(1), train_line(2) | {"skipped": True}, train_line(3)])
    run = read_run(tmp_path)
    assert skipped_steps(run) == [2.0]
    assert numbered_marks([run]) == []


def test_steps_that_were_not_finite_are_marked(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    assert skipped_steps(run) == [17.0, 18.0]
    page = html_report([run])
    assert '"skips":[[17.0,0],[18.0,0]]' in page
    assert "update skipped (NaN/Inf)" in page


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_it_can_be_made_of_almost_nothing(tmp_path, lines):
    write_metrics(tmp_path / "run", [train_line(step) for step in range(1, lines + 1)])
    page = html_report([read_run(tmp_path / "run")])
    assert ("No step has been logged yet" in page) == (lines == 0)
    assert ('id="loss"' in page) == (lines > 0)


def test_losses_that_are_never_finite_cost_their_chart_alone(tmp_path):
    write_metrics(tmp_path / "run", [train_line(step, math.nan) for step in range(1, 4)])
    page = html_report([read_run(tmp_path / "run")])
    assert 'id="loss"' not in page
    assert 'id="learning-rate"' in page


def test_a_hundred_thousand_lines_are_a_small_page_made_at_once(tmp_path):
    run = RunHistory(tmp_path / "run")
    steps = range(1, 100_001)
    for name, column in run.train.items():
        value = train_line(1).get(name) or 1.0
        column.extend(float(step) if name in ("step", "tokens", "time") else value + math.sin(step) for step in steps)
    began = time.process_time()
    page = html_report([run])
    assert time.process_time() - began < 2.0
    assert len(page) < 500_000


def test_several_runs_are_drawn_over_one_another_and_their_differences_are_side_by_side(tmp_path, capsys):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", learning_rate=0.5)
    write_run(tmp_path / "elsewhere" / "two", learning_rate=0.25)
    output = tmp_path / "all.html"
    runs = [str(tmp_path / name) for name in ("one", "two", "elsewhere/two", "one")]
    assert report.main([*runs, "--output", str(output)]) == 0
    page = output.read_text()
    assert "<h1>3 runs</h1>" in page, "one is named twice on the command line"
    row = re.search(r'<th scope="row">optim.learning_rate</th>(.*?)</tr>', page)
    assert row is not None
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["0.001", "0.5", "0.25"]
    assert "elsewhere/two: smoothed" in page
    assert '<th scope="row">run_name</th>' not in page.split("Config of")[0]
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "is not a run's folder" in capsys.readouterr().err
    for number in range(9):
        write_metrics(tmp_path / f"run{number}", [train_line(1)])
    assert report.main([str(tmp_path / f"run{number}") for number in range(9)]) == 2
    assert "9 runs: one page shows at most 8" in capsys.readouterr().err


def test_runs_over_one_another_leave_each_run_its_own_report(tmp_path, capsys):
    for name in ("one", "two"):
        write_run(tmp_path / name)
        assert report.main([str(tmp_path / name)]) == 0
    own = (tmp_path / "one" / "report.html").read_text()
    capsys.readouterr()
    assert report.main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one' / 'compared.html'}\n"
    assert "<h1>2 runs</h1>" in (tmp_path / "one" / "compared.html").read_text()
    assert (tmp_path / "one" / "report.html").read_text() == own


def test_runs_of_one_name_are_distinguished_by_their_folders():
    paths = ["/x/a/run", "/y/a/run", "/y/b/run", "/y/other"]
    assert labels_of([RunHistory(Path(path)) for path in paths]) == ["x/a/run", "y/a/run", "b/run", "other"]
    assert len({style_of(number) for number in range(8)}) == len({style_of(number).split()[0] for number in range(8)}) == 8


def test_the_parts_of_a_runs_time_are_all_of_it(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    spent = goodput(run)
    assert spent.wall_seconds == 49.0
    assert (spent.step_seconds, spent.data_seconds) == pytest.approx((16.0, 4.0))
    assert (spent.validation_seconds, spent.sample_seconds) == (1.0, 0.5)
    assert spent.redone_seconds == pytest.approx(1.0), "two steps of half a second"
    # From SIGTERM to the next command; and where it was killed, from when its two lost steps were done.
    assert spent.downtime_seconds == pytest.approx(0.5 + 1.5)
    assert spent.starting_seconds == pytest.approx((3.0 + 0.5) + (0.5 + 1.0) + (0.5 + 0.5))
    named = spent.useful_seconds + spent.starting_seconds + spent.downtime_seconds + spent.redone_seconds + spent.sample_seconds
    assert spent.other_seconds == pytest.approx(49.0 - named)
    page = html_report([run])
    for part in ("waiting for data", "samples", "start-up", "downtime between restarts"):
        assert f"{part}</th>" in page


def test_smoothing_keeps_a_constant_passes_over_gaps_does_not_lag_and_fits_short_runs():
    assert smoothed([5.0, math.nan, 5.0, 5.0])[::2] == pytest.approx([5.0, 5.0])
    assert math.isnan(smoothed([5.0, math.nan])[1])
    line = [float(step) for step in range(1000)]
    assert smoothed(line)[200:800] == pytest.approx(line[200:800], abs=0.05)
    falling = [10.0, 8.0, 6.0, 5.0, 4.5]
    assert smoothed(falling) == pytest.approx(falling, abs=0.01)
    noise = smoothed([math.sin(7 * step) for step in range(1000)])
    assert max(map(abs, noise[50:-50])) < 0.1


def test_the_beginning_and_rare_spikes_do_not_squash_the_rest():
    losses = [2 + 9 * math.exp(-step / 20) for step in range(1000)]
    losses[500] = 90.0
    line = Line("loss", range(1000), losses, "c0 d0")
    top = clipped_top([line], 2.0, 90.0)
    assert 2.03 < top < 2.2
    drawn = figure(Chart("Loss", "", [line], clips=True))
    assert re.search(r'"high":2\.\d+,"top":90\.0,', drawn)
    assert clipped_top([line], 2.0, 90.0, shows_beginning=True) == losses[0], "a loss shows where it came from"
    assert clipped_top([Line("flat", range(100), [float(i) for i in range(100)], "c0")], 0.0, 99.0) == 99.0


def test_long_lines_are_thinned_without_losing_a_spike():
    y = [0.0] * 100_000
    y[54_321] = 9.0
    x, thinned = thin(range(100_000), y)
    assert len(x) <= MAX_POINTS + 4
    assert max(thinned) == 9.0
    assert x == sorted(x)
    assert thin([1, 2, 3], [1.0, math.nan, 3.0]) == ([1, 3], [1.0, 3.0])


def test_no_values_make_an_axis_that_the_script_cannot_draw():
    assert thin([1, 2, 3], [1.0, 1.79e308, -1.79e308]) == ([1], [1.0])
    for values in ([1.0, 1.79e308], [1.0, 1.0 + 2**-52], [0.0, 0.0]):
        drawn = figure(Chart("Loss", "", [Line("loss", range(2), values, "c0 d0")], clips=True))
        data = json.loads(re.findall(r"<script[^>]*>(.*?)</script>", drawn)[0], parse_constant=pytest.fail)
        assert data["high"] - data["low"] >= 0.1, values
        assert data["high"] == data["top"], "nothing is cut off"


def test_the_other_axes_start_and_end_with_the_run_and_jump_over_downtime(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_trainer.html_report.charts.POINTS_OF_AN_AXIS", 4)
    axes = axes_of(read_run(write_run(tmp_path / "run")))
    assert (axes["step"][0], axes["step"][-1]) == (1, 40)
    assert (axes["tokens"][0], axes["tokens"][-1]) == (10, 400)
    assert axes["hours"][-1] == pytest.approx(48 / 3600, abs=1e-5)
    assert axes["step"] == [1, 11, 15, 16, 21, 25, 26, 31, 40]


def test_samples_are_spread_over_the_run():
    samples = [SampleText(step, "", "") for step in range(1, 101)]
    shown = spread(samples, SAMPLES_SHOWN)
    assert len(shown) == SAMPLES_SHOWN
    assert (shown[0].step, shown[-1].step) == (1, 100)
    assert spread(samples[:3], SAMPLES_SHOWN) == samples[:3]


def test_pages_made_while_training_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    made = []

    def slow_page(history):
        made.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("dist_trainer.html_report.page.write_report", slow_page)
    tracker = ReportTracker(tmp_path, clock=lambda: now[0])
    while now[0] < 1000:
        tracker.log(validation_line(1))
        now[0] += 1.0
    assert len(made) * 2.0 <= 1000 * SHARE_OF_TIME + 2.0
    assert len(made) > 1
    tracker.close(state="finished", reason=None)
    assert made[-1] >= 1000


# ------------------------------------------------------------------------------------------------ for all eyes


def palettes() -> dict[str, dict[str, str]]:
    """The colours of each theme, by the names that style.css gives them."""
    light, dark, paper = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    return {
        name: dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for name, block in {"light": light, "dark": dark, "print": paper}.items()
    }


def contrast(one: str, other: str) -> float:
    """Of two colours, from 1 to 21, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


def blended(colour: str, background: str, opacity: float) -> str:
    """What `colour` looks like over `background`."""
    pairs = [(int(colour[place : place + 2], 16), int(background[place : place + 2], 16)) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(opacity * own + (1 - opacity) * other):02x}" for own, other in pairs)


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_text_and_lines_have_the_contrast_that_wcag_aa_asks_for(theme):
    colours = palettes()[theme]
    assert set(colours) == {"ink", "faded", "paper", "card", "edge", "mark", *(f"c{number}" for number in range(8))}
    for background in ("paper", "card"):
        for text in ("ink", "faded", "mark"):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
        for number in range(8):
            assert contrast(colours[f"c{number}"], colours[background]) >= 3, (number, background)
    opacity = re.search(r"\.faint path \{ opacity: (\.\d+);", STYLE)
    assert opacity is not None
    for number in range(MAX_RUNS_WITH_RAW_LOSS):
        faint = blended(colours[f"c{number}"], colours["card"], float(opacity[1]))
        assert contrast(faint, colours["card"]) >= 3, number
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize(("seconds", "unit"), [(0.5, "ms, including waiting"), (12.5, "s, including waiting")])
def test_times_are_in_the_unit_that_suits_them(tmp_path, seconds, unit):
    write_metrics(tmp_path, [train_line(step) | {"step_seconds": seconds} for step in (1, 2, 3)])
    page = html_report([read_run(tmp_path)])
    assert f"<b>Step time</b> <small>{unit} for data</small>" in page


def test_what_is_unknown_has_no_tile_and_what_was_trained_is_under_the_title(tmp_path):
    write_run(tmp_path / "run")
    page = html_report([read_run(tmp_path / "run")])
    head = page[page.index("<h1>") : page.index("</dl>")]
    assert "unknown" not in head
    assert "<dt>MFU</dt>" not in head
    assert "decoder_lm, 1.23M parameters, 4 layers of 192" in head
    assert "austen, 16 x 256 tokens per step" in head
    assert "<code>python -m dist_trainer.train --seed 1</code>" in head
    assert "exp(" not in page.replace("<details><summary>how curves are smoothed</summary>", "<hidden>").split("<hidden>")[0]


def test_no_layers_are_named_for_a_model_of_the_user_s_which_may_ignore_these_keys(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    run.config["model"]["name"] = "my_project:build"
    page = html_report([run])
    assert "my_project:build, 1.23M parameters<" in page
    assert "layers of" not in page


def test_a_page_of_a_folder_without_config_or_events_says_nothing_of_what_was_trained(tmp_path):
    write_metrics(tmp_path, [train_line(1)])
    assert 'class="about"' not in html_report([read_run(tmp_path)])


def test_the_best_results_are_those_of_the_lowest_validation_loss_and_the_last_loss_is_the_last(tmp_path):
    lines = [train_line(10, 3.5), validation_line(10, 3.0), train_line(20, 3.25), validation_line(20, 2.5)]
    lines += [train_line(30, 3.0), validation_line(30, 2.75) | {"bits_per_byte": 1.0}]
    lines[3] |= {"bits_per_byte": 0.9375}
    write_metrics(tmp_path, lines)
    shown = dict(results(read_run(tmp_path), Goodput()))
    assert shown["best validation loss"] == "2.5000"
    assert shown["best step"] == "20"
    assert shown["perplexity at best"] == "12.18"
    assert shown["bits per byte at best"] == "0.938"
    assert shown["last training loss"] == "3.0000"
