"""analyze --report and --plot: the page holds everything, and pictures are drawn."""

from __future__ import annotations

import struct

import pytest

import dora_convert
from dora_convert.reports.analyze_page import render_analysis
from dora_convert.reports.charts import LinearAxis, colour

from .test_analyze import trainer_folder
from .test_page import Page
from .toy import make_adapter, make_base


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


def test_one_path_is_one_file(tmp_path, run):
    """The table, the picture and the page are not written over each other."""
    for other in ("report", "plot"):
        code, out, err = run("analyze", "base", "tuned", "--csv", tmp_path / "x.svg", f"--{other}", tmp_path / "x.svg")
        assert (code, out) == (2, "")
        assert "name the same file" in err
    assert not list(tmp_path.iterdir())


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
