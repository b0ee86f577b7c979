"""--report of verify and inspect: one page that holds everything and fetches nothing, whatever the names are."""

from __future__ import annotations

import math
import shlex
from html.parser import HTMLParser

import pytest

import dora_convert
from dora_convert.errors import OutputError
from dora_convert.reports.files import write_file
from dora_convert.reports.verify import CheckedModule, Untouched, VerifyReport
from dora_convert.reports.verify_page import render_comparison

from .test_verify import SQUARE, load, merged, moved, tamper

VOID = {"meta", "line", "wbr"}


class Page(HTMLParser):
    """Elements that are closed in the order they were opened, and what they hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.joined = [], [], [], False
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert not {name for name, _ in attrs} & {"src", "href", "srcset"}
        self.joined = tag == "wbr"  # a name that wraps is one text
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        if self.joined:
            self.texts[-1] += data
        else:
            self.texts.append(data)
        self.joined = False

    def count(self, tag, **attrs):
        return sum(tag == name and attrs.items() <= found.items() for name, found in self.tags)


def read(path):
    text = path.read_bytes().decode()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not any(word in text for word in ("<script", "url(", "@import"))
    return Page(text)


def test_agree_and_differ(tmp_path, run):
    base, adapter, out = merged(tmp_path)
    file = tmp_path / "page.html"
    file.write_text("older")
    assert run("verify", base, adapter, out, "--report", file, "-q") == (0, "agree\n", "")
    page, report = read(file), dora_convert.verify(base, [adapter], out)
    assert page.count("span", **{"class": "agree"}) == 1
    assert page.count("circle") == page.count("tr") - 1 == len(report.modules)
    assert page.count("path", **{"class": "wrong"}) == 0
    tamper(out, {SQUARE: moved(load(out)[SQUARE], 40, 3)})
    report = dora_convert.verify(base, [adapter], out, report=file)
    page = read(file)
    assert report.verdict == "differ"
    assert page.count("span", **{"class": "differ"}) == 1
    assert page.count("path", **{"class": "wrong"}) == page.count("tr", **{"class": "wrong"}) == 1
    assert {*report.problems, report.base, *report.adapters, report.merged} <= {*page.texts}
    assert page.texts.index(SQUARE) < min(page.texts.index(m.name) for m in report.modules if m.name != SQUARE)
    assert not list(tmp_path.glob(".dora-convert-*.tmp"))


def test_the_page_says_its_command(tmp_path, run):
    """The command without the token, versions, and the terms; for inspect, too, and the same from Python."""
    base, adapter, out = merged(tmp_path)
    file = tmp_path / "a page.html"
    words = ("verify", base, adapter, out, "--samples", "3")
    assert run(*words, "--report", file, "--token", "hf_secret")[0] == 0
    page = read(file)
    command = shlex.join(["dora-convert", *map(str, words), "--report", str(file)])
    assert command in page.texts
    assert not any("secret" in text for text in page.texts)
    assert any(text.startswith(f"dora-convert {dora_convert.__version__} · Python 3.") for text in page.texts)
    assert {"ulp", "output error", "rounding alone"} <= {*page.texts}
    dora_convert.inspect(adapter, base, report=file)
    page = read(file)
    assert (
        shlex.join(["dora-convert", "inspect", str(adapter), "--base", str(base), "--report", str(file)]) in page.texts
    )
    assert page.count("span", **{"class": "fits"}) == 1
    assert {"PEFT", "vLLM", "scaling"} <= {*page.texts}


def test_hostile_names_and_numbers(tmp_path):
    name = "<script>alert('\"&amp;\udc80\0\u202e\n</title>"
    numbers = [(None, None), (0.0, 0.0), (math.inf, 1e-3), (math.nan, 1e-3), (1e-300, 1e300), (5e-324, 1.0)]
    modules = tuple(
        CheckedModule(name=name, elements=2, wrong_elements=i % 2, max_ulp=i, output_error=y, output_floor=x)
        for i, (y, x) in enumerate(numbers)
    )
    for some in (modules, modules[:1], modules[1:2], ()):
        report = VerifyReport(
            base=name, adapters=(name, name), merged=name, verdict="differ", modules=some,
            untouched=Untouched(tensors=1, identical=0), problems=(name,), notes=(name,), warnings=(name,),
            ledger=(), seconds=0.0,
        )  # fmt: skip
        write_file(tmp_path / "page.html", render_comparison(report, name).encode())
        page = read(tmp_path / "page.html")
        shown = "<script>alert('\"&amp;\\udc80\\x00\\u202e\\n</title>"
        assert page.texts.count(shown) == 8 + len(some)
        marks = page.count("circle") + page.count("path", **{"class": "wrong"})
        assert marks == {6: 4, 1: int(some == modules[1:2]), 0: 0}[len(some)]


def test_where_no_page_can_be(tmp_path, run, monkeypatch):
    """Told before anything is compared, or even opened."""
    (tmp_path / "file").touch()
    nowhere = tmp_path / "none"
    for bad in (nowhere / "page.html", tmp_path, tmp_path / "file" / "page.html", "/dev/null", "", "x" * 300):
        code, out, err = run("verify", nowhere, nowhere, nowhere, "--report", bad)
        assert (code, out) == (2, "")
        assert "cannot write the report" in err
        assert "Traceback" not in err
    with pytest.raises(OutputError):
        dora_convert.verify(nowhere, nowhere, nowhere, report=tmp_path / "a\0b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
