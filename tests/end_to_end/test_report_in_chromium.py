"""report.html in a real browser: it fits a phone and a desk, in the light and in the dark, draws its curves, answers keys and
fingers, and has no errors.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from dist_trainer import report
from tests.end_to_end.commands import SMALL
from tests.end_to_end.forked_commands import quick_command
from tests.unit.tracking.runs import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

# What a reader does and sees, written into the page's title, which the frame around it hands on.
PROBE = r"""
const seen = {errors: []};
onerror = message => { seen.errors.push(message) };
addEventListener('load', () => {
  const all = words => [...document.querySelectorAll(words)];
  const charts = all('.chart'), loss = document.querySelector('#loss'), plot = loss.querySelector('.plot');
  const read = () => loss.querySelector('output').textContent;
  const texts = chart => [...chart.querySelectorAll('.plot text')];
  const labels = () => texts(loss).map(text => text.textContent).join(' ');
  const key = name => plot.dispatchEvent(new KeyboardEvent('keydown', {key: name, cancelable: true}));
  seen.dark = matchMedia('(prefers-color-scheme: dark)').matches;
  seen.background = getComputedStyle(document.body).backgroundColor;
  seen.resting = read();
  seen.value = plot.getAttribute('aria-valuetext');
  plot.focus();
  seen.focused = document.activeElement === plot;
  key('End'); seen.last = read();
  key('ArrowLeft'); seen.before = read();
  key('Home'); seen.first = read();
  seen.spoken = plot.getAttribute('aria-valuetext');
  const badge = texts(loss).find(text => text.textContent === '2');
  if (badge) {
    const box = badge.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent('pointerdown', {pointerType: 'touch', clientX: box.x + box.width / 2, clientY: box.y}));
    seen.touched = read();
  }
  seen.by_steps = labels();
  document.querySelector('[value=tokens]').click(); seen.by_tokens = labels();
  document.querySelector('[value=hours]').click(); seen.by_hours = labels();
  const range = document.querySelector('[name=range]');
  const note = loss.querySelector('.clipnote');
  seen.clipped = note.hidden ? '' : note.textContent;
  seen.offers_range = range.offsetParent !== null;
  seen.clips = charts.some(chart => !chart.querySelector('.clipnote').hidden);
  range.click(); seen.full = labels(); seen.noted = charts.some(chart => !chart.querySelector('.clipnote').hidden);
  seen.charts = charts.length;
  seen.pictures = charts.filter(chart => chart.querySelector('.plot svg').getBoundingClientRect().height > 150).length;
  seen.smallest_text = Math.min(...charts.flatMap(texts).map(text => text.getBoundingClientRect().height));
  seen.cut = charts.flatMap(chart => texts(chart).filter(
    text => text.getBoundingClientRect().left < chart.querySelector('.plot svg').getBoundingClientRect().left - 0.5
  )).map(text => text.textContent);
  seen.about = all('.about').map(line => line.textContent);
  const overview = document.querySelector('.overview .table');
  seen.hidden_columns = overview ? overview.scrollWidth - overview.clientWidth : 0;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.spilling = all('.tiles div, figcaption, .key, .sample, .timeline').filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent);
  seen.unnamed = all('[tabindex="0"]').filter(e => !e.getAttribute('role') || !e.getAttribute('aria-label')).length;
  seen.fields = all('input').every(input => input.closest('label') && input.tabIndex === 0);
  dispatchEvent(new Event('beforeprint')); seen.printed = all('details').every(part => part.open);
  dispatchEvent(new Event('afterprint')); seen.folded = all('details').every(part => !part.open);
  seen.requests = performance.getEntriesByType('resource').length;
  document.title = JSON.stringify(seen);
});
"""


def look_at(page: Path, frames: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """What a reader sees of `page` in frames of the given widths and colour schemes, from one start of the browser."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<head>", f"<head><script>{PROBE}</script>", 1))
    # A window is never narrower than about 500 pixels, and has one colour scheme: frames have those they are given.
    outer = page.with_name("frames.html")
    inner = "".join(
        f"<iframe src=probed.html style='width:{width}px;height:900px;border:0;color-scheme:{scheme}'></iframe>"
        for width, scheme in frames
    )
    collect = "[...document.querySelectorAll('iframe')].map(frame => JSON.parse(frame.contentDocument.title))"
    outer.write_text(f"{inner}<script>onload=()=>{{document.title='SEEN'+JSON.stringify({collect})+'END'}}</script>")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words = [CHROMIUM, *options, f"--user-data-dir={page.parent / 'profile'}", outer.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = re.search("SEEN(.*?)END", done.stdout)
    assert found, done.stdout[:2000] + done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def check(seen: dict[str, Any]) -> None:
    """What holds of any page at any width."""
    assert seen["errors"] == []
    assert seen["requests"] == 0
    assert seen["overflow"] <= 0
    assert seen["cut"] == [], "labels of an axis"
    assert seen["spilling"] == []
    assert seen["charts"] == seen["pictures"] >= 6
    assert seen["smallest_text"] >= 11, "pixels, at any width"
    assert seen["unnamed"] == 0
    assert seen["fields"]
    assert seen["offers_range"] == seen["clips"]
    assert not seen["noted"], "with the full range nothing is cut off"
    assert seen["printed"]
    assert seen["folded"]
    assert seen["focused"]
    assert seen["value"] == seen["last"], "read aloud before any key"
    assert seen["spoken"] == seen["first"]
    assert seen["first"].startswith("step 1 ·")
    assert " step" in seen["by_steps"]
    assert " tokens" in seen["by_tokens"]
    assert re.search(r" (s|min|h)\b", seen["by_hours"])


def test_a_run_with_restarts_works_at_each_width_and_in_the_dark(tmp_path):
    run = write_run(tmp_path / "run", learning_rate=1.25e-5)
    assert report.main([str(run)]) == 0
    phone, desk, dark = look_at(run / "report.html", [(390, "light"), (1400, "light"), (390, "dark")])
    for seen in (phone, desk, dark):
        check(seen)
        assert seen["resting"] == seen["last"]
        assert re.match(r"step 40 · training [\d.]+ · smoothed [\d.]+ · validation [\d.]+", seen["last"])
        assert seen["before"].startswith("step 39 ·")
        assert "[2] killed without a message; restarted from step 25, 2 steps repeated" in seen["touched"]
        assert seen["by_steps"].count("×") == 2
        assert seen["by_tokens"].split()[0] == seen["by_steps"].split()[0], "the values' axis is what it was"
        assert seen["by_steps"].startswith("4 6 8 10 "), "the first drop of the loss is seen"
        assert not seen["clipped"]
        assert seen["about"][0].startswith("model decoder_lm, 1.23M parameters, 4 layers of 192")
        assert seen["about"][1] == "python -m dist_trainer.train --seed 1"
        assert seen["by_hours"].startswith("4 6 8 10 ")
    assert not phone["dark"]
    assert dark["dark"]
    assert (phone["background"], dark["background"]) == ("rgb(247, 247, 245)", "rgb(20, 23, 28)")


def test_several_runs_work_at_each_width(tmp_path):
    rates = {"a": 0.1, "b": 0.2, "c": 0.3}
    runs = [write_run(tmp_path / name / "run", learning_rate=rate, steps=400, spike_at=300) for name, rate in rates.items()]
    output = tmp_path / "several.html"
    assert report.main([*map(str, runs), "--output", str(output)]) == 0
    phone, *wider = look_at(output, [(390, "dark"), (800, "light"), (1400, "light")])
    for seen in (phone, *wider):
        check(seen)
        assert seen["about"] == wider[0]["about"], "what they have in common"
        assert seen["hidden_columns"] <= 0 or seen is phone
        assert re.fullmatch(r"The axis ends at \d+(\.\d+)?; higher values, up to 45, are cut off\.", seen["clipped"])
        assert seen["by_steps"].startswith("4 6 8 10 ")
        assert seen["full"].startswith("10 20 30 40 "), "the spike too"
        assert "a/run: training" in seen["last"]
        assert "c/run: validation" in seen["last"]


@pytest.mark.slow
def test_the_report_of_a_real_run_works(tmp_path):
    done = quick_command(*SMALL, "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    for seen in look_at(tmp_path / "debug" / "report.html", [(390, "light"), (1400, "light")]):
        check(seen)
        assert re.match(r"step 20 · training [\d.]+ · smoothed [\d.]+ · validation [\d.]+", seen["last"])
