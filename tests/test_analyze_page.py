"""analyze --report and --plot: the page holds everything, is plain to a browser at any width, and pictures are drawn."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess

import pytest

import dora_convert
from dora_convert.reports.analyze_page import render_analysis
from dora_convert.reports.charts import LinearAxis, colour

from .test_analyze import trainer_folder
from .test_page import Page
from .toy import make_adapter, make_base

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three steps of a DoRA on four layers."""
    folder = tmp_path_factory.mktemp("analysis")
    base = make_base(folder / "base", layers=4)
    return dora_convert.analyze(base.path, trainer_folder(folder / "out", base))


def test_the_page_is_whole(report):
    """Every point is drawn, nothing is fetched, and every element is closed."""
    text = render_analysis(report)
    assert not any(word in text for word in ("http", "url(", "@import", " src=", " href="))
    page = Page(text)
    assert page.count("path", **{"class": "dot"}) == len(report.points) + len(report.tuned)
    tips = [attrs["data-tip"] for _, attrs in page.tags if "data-tip" in attrs]
    assert {tip.partition(",")[0] for tip in tips} == {point.module for point in report.points}
    assert page.count("rect") == len(report.points) + 1
    assert {*report.correlation} <= {*page.texts}


def test_hostile_names_are_text(tmp_path, report):
    """A name cannot become markup or script."""
    from dataclasses import replace

    name = "</script><script>alert('\"&\udc80\u202e\n"
    points = tuple(replace(point, module=name, kind=name) for point in report.points)
    odd = replace(
        report, points=points, base=name, notes=(name,), correlation={name: next(iter(report.correlation.values()))}
    )
    text = render_analysis(odd)
    assert text.count("<script") == 1
    assert "\u202e" not in text
    text.encode()
    assert render_analysis(replace(report, points=(), tuned=(), correlation={}, vectors=()))


def test_axes_and_colours():
    """Round ticks inside the plot, powers of ten left out of labels, and colours between those of the map."""
    for values in ([1e-7, 3.3e-7], [0.0, 1.0], [5.0], [0.0], [-2.0, 3e5], [0.9991, 0.9999]):
        axis = LinearAxis.around(values, 50, 350)
        labels = [label for _, label in axis.ticks]
        assert 2 <= len(labels) == len(set(labels)) <= 7, (values, labels)
        assert all(50 <= place <= 350 for place, _ in axis.ticks)
        assert all(len(label) <= 6 for label in labels)
    assert LinearAxis.around([2e-4, 3e-4], 0, 1).unit == " × 10⁻⁴"
    assert (colour(0), colour(1), colour(2)) == ("#482475", "#fde725", "#fde725")


CHECKS = """
<iframe id="page" style="border: 0; width: WIDTHpx; height: 3000px" srcdoc="PAGE"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow, found = [];
  const say = text => found.push(text);
  const wide = page.documentElement.scrollWidth;
  if (wide > WIDTH) say("the page is " + wide + " wide");
  for (const svg of page.querySelectorAll("svg[role=img]")) {
    const room = svg.getBoundingClientRect(), name = svg.getAttribute("aria-label");
    if (!room.width) continue;
    const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [text, box] of boxes)
      if (box.left < room.left - 1 || box.right > room.right + 1 || box.top < room.top - 1 || box.bottom > room.bottom + 1)
        say(name + ": " + text + " is cut");
    for (let i = 0; i < boxes.length; i++)
      for (let j = 0; j < i; j++) {
        const [a, b] = [boxes[i][1], boxes[j][1]];
        if (a.left < b.right - .5 && b.left < a.right - .5 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
          say(name + ": " + boxes[i][0] + " overlaps " + boxes[j][0]);
      }
  }
  const dot = page.querySelector("[data-tip]"), at = dot.getBoundingClientRect();
  dot.dispatchEvent(new view.PointerEvent("pointermove", {bubbles: true, clientX: at.x, clientY: at.y}));
  const tip = page.getElementById("tip"), box = tip.getBoundingClientRect();
  if (tip.hidden || tip.textContent !== dot.dataset.tip) say("no tip");
  if (box.left < 0 || box.right > WIDTH) say("the tip is cut");
  const choice = page.querySelector("[data-steps]");
  choice.value = choice.options[0].value;
  choice.dispatchEvent(new view.Event("change", {bubbles: true}));
  const shown = [...page.querySelectorAll("[data-step]")].filter(each => each.getBoundingClientRect().width);
  if (shown.length !== 2 || shown.some(each => each.dataset.step !== choice.value)) say("wrong step shown");
  const look = view.getComputedStyle(page.body);
  document.getElementById("found").textContent = JSON.stringify([found, look.backgroundColor, look.color]);
};
</script>
"""


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(400, False), (900, True), (1600, False)])
def test_in_a_browser(tmp_path, report, width, dark):
    """No errors in the console, no text cut or over another, tips and steps work, and dark is dark."""
    text = CHECKS.replace("WIDTH", str(width)).replace("PAGE", html.escape(render_analysis(report)))
    (tmp_path / "checks.html").write_text(f'<!doctype html><meta charset="utf-8">{text}', encoding="utf-8")
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--blink-settings=preferredColorScheme=0"] * dark
    words += ["--virtual-time-budget=3000", "--enable-logging=stderr", f"--window-size={width + 50},3000", "--dump-dom"]
    done = subprocess.run(
        [*words, f"file://{tmp_path / 'checks.html'}"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "CONSOLE" not in done.stderr
    found, background, ink = json.loads(
        html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1])
    )
    assert found == []
    brightness = [sum(map(int, re.findall(r"\d+", each)[:3])) for each in (background, ink)]
    assert (brightness[0] < brightness[1]) == dark


def test_pictures(tmp_path, report, base, run):
    """png and svg, the same bytes each time; without matplotlib an error that names the extra."""
    adapter = make_adapter(tmp_path / "a", base, dora=True)
    code, _, err = run("analyze", base.path, adapter, "--plot", tmp_path / "page.html")
    assert (code, Page((tmp_path / "page.html").read_text()).open) == (0, [])
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        code, _, err = run("analyze", base.path, adapter, "--plot", tmp_path / "x.png")
        assert code == 2
        assert "dora-convert[plot]" in err
        pytest.skip("matplotlib is not installed: pip install 'dora-convert[plot]'")
    from dora_convert.reports.analyze_picture import draw

    png, svg = draw(report, "png"), draw(report, "svg")
    assert svg == draw(report, "svg")
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">II", png[16:24])[0] > 1000
    assert svg.count(b"<use") >= len(report.points)
    assert run("analyze", base.path, adapter, "--plot", tmp_path / "x.svg")[0] == 0
    assert (tmp_path / "x.svg").read_bytes().startswith(b"<?xml")
