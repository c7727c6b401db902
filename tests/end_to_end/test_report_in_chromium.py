"""report.html in a real browser: it fits a phone and a desk, draws its curves, answers the keyboard, and has no errors."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from dist_trainer import report
from tests.end_to_end.commands import SMALL
from tests.end_to_end.forked_commands import quick_command

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

# What a reader does and sees, written into the page's title, which --dump-dom shows.
PROBE = """
const seen = {errors: []};
onerror = message => { seen.errors.push(message) };
addEventListener('load', () => {
  const charts = [...document.querySelectorAll('.chart')];
  const key = name => charts[0].dispatchEvent(new KeyboardEvent('keydown', {key: name, cancelable: true}));
  charts[0].focus();
  key('End'); seen.last = charts[0].querySelector('output').textContent;
  key('Home'); seen.first = charts[0].querySelector('output').textContent;
  seen.charts = charts.length;
  seen.pictures = charts.filter(chart => chart.querySelector('svg').getBoundingClientRect().height > 50).length;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.requests = performance.getEntriesByType('resource').length;
  document.title = 'SEEN' + JSON.stringify(seen) + 'END';
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report that the `report` command makes of a short run."""
    output = tmp_path_factory.mktemp("runs")
    done = quick_command(*SMALL, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert report.main([str(output / "debug")]) == 0
    return (output / "debug" / "report.html").read_text()


@pytest.mark.parametrize("width", [390, 1400])
def test_the_report_works_at_this_width(page, width, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("<head>", f"<head><script>{PROBE}</script>", 1))
    # A window is never narrower than about 500 pixels: the page stands in a frame of the wanted width.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f"<iframe src=probed.html style='width:{width}px;height:900px;border:0'></iframe><script>"
        "onload=()=>{document.title=document.querySelector('iframe').contentDocument.title}</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    words = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    found = re.search("SEEN(.*)END", done.stdout)
    assert found, done.stdout[:2000] + done.stderr[-2000:]
    seen = json.loads(unescape(found[1]))
    assert seen["errors"] == []
    assert seen["requests"] == 0
    assert seen["overflow"] <= 0
    assert seen["charts"] == seen["pictures"] >= 5
    assert seen["first"].startswith("step 1 ")
    assert re.match(r"step 20 .*training [\d.]+ .*validation [\d.]+", seen["last"])
