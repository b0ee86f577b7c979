"""The pages of verify, analyze and inspect in headless Chromium: narrow and wide, light and dark, in one start."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import dora_convert
from dora_convert.reports.verify import Continuation, OutputsReport
from dora_convert.reports.verify_page import render_comparison

from .test_analyze import trainer_folder
from .test_verify import tamper
from .toy import load, make_adapter, make_base

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WIDTHS = (400, 800, 1600)
FRAME = """
<iframe data-name="{name}" style="border: 0; width: {width}px; height: 3000px; color-scheme: {scheme}" srcdoc="{page}">
</iframe>
"""
"""A frame's own color-scheme is what its page prefers."""
CHECKS = """
<pre id="found"></pre>
<script>
const found = {};
const brightness = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
const luminance = colour => {
  const [r, g, b] = brightness(colour).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const contrast = (a, b) => (Math.max(luminance(a), luminance(b)) + .05) / (Math.min(luminance(a), luminance(b)) + .05);
const lines = (page, node) => {
  const range = page.createRange();
  range.selectNodeContents(node);
  return new Set([...range.getClientRects()].map(box => Math.round(box.bottom / 4))).size;
};
const texts = (page, root) => {
  const walker = page.createTreeWalker(root, NodeFilter.SHOW_TEXT), nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  return nodes;
};
function check(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, width = frame.clientWidth, words = [];
  const say = text => words.push(text);
  const look = element => view.getComputedStyle(element);
  if (page.documentElement.scrollWidth > width) say("the page is " + page.documentElement.scrollWidth + " wide");
  for (const cell of page.querySelectorAll("td.n"))
    if (lines(page, cell) > 1) say("a number is broken: " + cell.textContent);
  for (const cell of page.querySelectorAll("td:first-child, dd"))
    for (const node of texts(page, cell))
      if (node.length < 24 && !/[ -]/.test(node.data) && lines(page, node) > 1) say("a name is broken: " + node.data);
  for (const mark of page.querySelectorAll(".mark, .verdict")) {
    if (!/[✓✗?]/.test(mark.textContent)) say("colour without a sign");
    if (mark.matches(".mark") && !mark.getAttribute("aria-label")) say("a sign without a word");
  }
  const card = look(page.querySelector("section")).backgroundColor;
  for (const element of page.querySelectorAll("p, dt, dd, th, td, li, .good.mark, .wrong.mark"))
    if (contrast(look(element).color, card) < 4.5) say("faint: " + element.textContent.slice(0, 30));
  for (const badge of page.querySelectorAll(".verdict"))
    if (contrast(look(badge).color, look(badge).backgroundColor) < 4.5) say("faint badge");
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
  if (page.getElementById("tip")) moves(page, view, width, say);
  const [ground, ink] = [look(page.body).backgroundColor, look(page.body).color];
  found[frame.dataset.name] = [words, luminance(ground) < luminance(ink)];
}
function moves(page, view, width, say) {
  const dot = page.querySelector("[data-tip]"), at = dot.getBoundingClientRect();
  dot.dispatchEvent(new view.PointerEvent("pointermove", {bubbles: true, clientX: at.x, clientY: at.y}));
  const tip = page.getElementById("tip"), box = tip.getBoundingClientRect();
  if (tip.hidden || tip.textContent !== dot.dataset.tip) say("no tip");
  if (box.left < 0 || box.right > width) say("the tip is cut");
  const choice = page.querySelector("[data-steps]");
  choice.value = choice.options[0].value;
  choice.dispatchEvent(new view.Event("change", {bubbles: true}));
  const shown = [...page.querySelectorAll("[data-step]")].filter(each => each.getBoundingClientRect().width);
  if (shown.length !== 2 || shown.some(each => each.dataset.step !== choice.value)) say("wrong step shown");
}
window.onload = () => {
  document.querySelectorAll("iframe").forEach(check);
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>
"""


@pytest.fixture
def pages(tmp_path):
    """One page of each kind: merges that differ, a training, an adapter that does not fit, a checkpoint."""
    base, other = make_base(tmp_path / "base", layers=4), make_base(tmp_path / "other", layers=2)
    adapter = make_adapter(tmp_path / "adapter", base, dora=True)
    dora_convert.merge(base.path, adapter, tmp_path / "merged")
    name = "model.layers.3.mlp.down_proj.weight"
    tamper(tmp_path / "merged", {name: load(tmp_path / "merged")[name] * 1.5})
    verbs = {
        "weights": lambda page: dora_convert.verify(base.path, adapter, tmp_path / "merged", report=page),
        "training": lambda page: dora_convert.analyze(base.path, trainer_folder(tmp_path / "out", base), report=page),
        "misfit": lambda page: dora_convert.inspect(adapter, other.path, report=page),
        "checkpoint": lambda page: dora_convert.inspect(tmp_path / "merged", report=page),
    }
    for title, write in verbs.items():
        write(tmp_path / f"{title}.html")
    drawn = {title: (tmp_path / f"{title}.html").read_text(encoding="utf-8") for title in verbs}
    return drawn | {"outputs": render_comparison(outputs(), "dora-convert verify base adapter merged")}


def outputs():
    """A comparison of outputs, one of two continuations the same."""
    texts = (
        Continuation("The capital of France is", " Paris, matey!\nAll roads", " Paris, matey!\nAll roads"),
        Continuation("Once upon a time " * 8, " there sailed a ship", " there was a king"),
    )
    return OutputsReport(
        base="org/base", adapters=("org/adapter",), merged="out/" + "a-long-name-without-dots" * 4, verdict="differ",
        problems=tuple(f"problem {k} of model.layers.{k}.self_attn.q_proj" for k in range(12)), notes=(), warnings=(), seconds=1.0,
        architecture="LlamaForCausalLM", prompts=2, positions=40, max_abs_logit_error=0.5, mean_abs_logit_error=0.1,
        rounding_floor=0.1, mean_rounding_floor=0.01, mean_margin=2.0, max_margin=8.0, mean_kl=1e-4,
        top1_agreement=0.9, greedy_agreement=0.5, device="cpu", offloaded=False, memory_bytes=1,
        peak_memory_bytes=None, continuations=texts,
    )  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")
def test_in_a_browser(tmp_path, pages):
    """No errors in the console; no text cut, broken, faint or over another; signs beside colours; dark is dark."""
    frames = {
        f"{title} {width} {scheme}": FRAME.format(
            name=f"{title} {width} {scheme}", width=width, scheme=scheme, page=html.escape(page)
        )
        for title, page in pages.items()
        for width in WIDTHS
        for scheme in ("light", "dark")
    }
    text = "\n".join(frames.values()) + CHECKS
    (tmp_path / "checks.html").write_text(f'<!doctype html><meta charset="utf-8">{text}', encoding="utf-8")
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words += ["--virtual-time-budget=10000", "--enable-logging=stderr", "--window-size=1700,3000", "--dump-dom"]
    done = subprocess.run(
        [*words, f"file://{tmp_path / 'checks.html'}"], capture_output=True, text=True, timeout=90, check=True
    )
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
    assert found == {name: [[], name.endswith("dark")] for name in frames}
