"""Reports as people meet them in Python: repr, print, and a notebook."""

from __future__ import annotations

import json
import re

import pytest

import dora_convert
from dora_convert.cli.sink import as_json
from dora_convert.reports import table


@pytest.fixture
def reports(tmp_path, base, adapter):
    """A report of every kind that needs no model code."""
    merged = dora_convert.merge(base.path, adapter, tmp_path / "out")
    return [
        dora_convert.merge(base.path, adapter, tmp_path / "x", dry_run=True),
        merged,
        dora_convert.unmerge(tmp_path / "out", adapter, tmp_path / "again"),
        dora_convert.verify(base.path, adapter, tmp_path / "out"),
        dora_convert.to_lora(base.path, adapter, tmp_path / "lora", rank=2),
        dora_convert.to_lora(base.path, adapter, tmp_path / "y", rank=2, dry_run=True),
        dora_convert.inspect(adapter, base.path),
        dora_convert.inspect(tmp_path / "out"),
        dora_convert.push(tmp_path / "out", "me/out", dry_run=True),
    ]


def test_reports_are_short_where_short_is_meant(reports):
    """A repr is a few lines of fields; print shows what the command line shows, without its options."""
    for report in reports:
        name = type(report).__name__
        assert repr(report).startswith(f"{name}(command=")
        assert len(repr(report)) < 1500, name
        text = str(report)
        assert "(command=" not in text
        assert "--verbose" not in text
        assert max(map(len, text.splitlines())) < 400
    dry, merged = map(str, reports[:2])
    assert "nothing was written" in dry
    assert re.search(r"^module +n +fate\n─+\nmodel\.layers\.\*\.\w+\.\w+ +2   merged: DoRA", merged, re.MULTILINE)
    assert merged.endswith(f"out: {reports[1].out}")


def test_notebooks_show_tables(reports):
    """Cells are HTML tables; names from files are escaped."""
    for report in reports:
        drawn = report._repr_html_()
        assert drawn.count("<table>") == drawn.count("</table>")
        assert "<div>" in drawn
    drawn = table(("name", ">n"), [("<b>\x1b", 1)])
    assert "&lt;b&gt;\\x1b" in drawn.html()
    assert drawn.text().splitlines()[0] == "name      n"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [], "b": {}},
        [1e-05, 1e22, -0.0, 10**30, None, True],
        {"é\u2028": "\ud800"},
        [float("nan"), {"y": "😀"}],
    ],
)
def test_json_is_laid_out_as_python_does(value):
    """Indented documents are those of Python's json, of NaN and halves of characters, too."""
    want = json.dumps(value, indent=2, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\ud800", "\\ud800")
    assert as_json(value, indent=2) == want
