"""The verbs as Python has them: names, options, words, bars and notices."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dora_convert
from dora_convert.api import talk
from dora_convert.api.words import in_python

SENTENCES = {
    "--device 'x' is not one of auto, cpu.": "device='x' is not one of auto, cpu.",
    "--max-memory 160 MB does not hold one block": "max_memory='160 MB' does not hold one block",
    "--max-memory 7MiB is the least": "max_memory='7MiB' is the least",
    "with --undo norms or exact, or name it with --base": "with undo='norms' or exact, or name it with base=",
    "--device cuda:3: this machine has none": "device='cuda:3': this machine has none",
    "--create-pr goes with --push-to-hub.": "create_pr=True goes with push_to_hub=.",
    "--no-local and --no-verify": "no_local=True and verify=False",
    "--exclude *up* matches no module, --exclude leaves it out": "exclude='*up*' matches no module, exclude= leaves it out",
    "--rank 32 or --max-error 0.01": "rank=32 or max_error=0.01",
    "dora-convert push --private, then; --private": "dora-convert push --private, then; private=True",
    "a -- b --unknown": "a -- b --unknown",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_messages_speak_python(text):
    """Options become keywords; commands to type stay as they are."""
    assert in_python(text) == SENTENCES[text]


def test_errors_speak_python(tmp_path, base, adapter):
    """Message, faults and hint are the text of an uncaught error, in Python's words."""
    with pytest.raises(dora_convert.UsageError, match=r"^weight='x' is not a number"):
        dora_convert.merge(base.path, adapter, tmp_path / "out", weight="x")
    dora_convert.merge(base.path, adapter, tmp_path / "out")
    with pytest.raises(dora_convert.OutputError) as caught:
        dora_convert.merge(base.path, adapter, tmp_path / "out")
    assert "overwrite=True" in caught.value.hint
    assert str(caught.value).endswith(f"\nHint: {caught.value.hint}")
    with pytest.raises(dora_convert.PlanError, match=r"(?s)no place.*\n  .*layers.0.*\nHint: "):
        dora_convert.merge(broken(adapter, tmp_path), adapter, tmp_path / "new")


def broken(adapter: Path, folder: Path) -> Path:
    """A base without the adapter's modules."""
    from safetensors.torch import save_file

    (folder / "other").mkdir()
    save_file({"model.embed.weight": torch.ones(4, 4)}, folder / "other/model.safetensors", {"format": "pt"})
    (folder / "other/config.json").write_text("{}")
    return folder / "other"


def test_objects_are_taken_wherever_names_are(tmp_path, base, adapter):
    """torch.dtype, torch.device, Path, a lone text and a list."""
    report = dora_convert.merge(
        Path(base.path), [Path(adapter)], Path(tmp_path / "out"), dtype=torch.float32, compute_dtype=torch.float64,
        device=torch.device("cpu"), include="up_proj", exclude=["down_proj"], max_memory=200 << 20, weight=1,
    )  # fmt: skip
    assert report.device == "cpu"
    assert report.compute_dtype == "float64"
    again = dora_convert.verify(
        str(base.path), adapter, tmp_path / "out", include=("up_proj",), report=tmp_path / "page.html"
    )
    assert again.verdict == "agree"


def test_names_and_docstrings_are_complete():
    """TAB lists the verbs; help explains every option in the command line's words, which are Python's here."""
    assert {"merge", "unmerge", "inspect", "DoraConvertError"} <= set(dir(dora_convert))
    assert "import_module" not in dir(dora_convert)
    for name in dora_convert.__all__:
        function = getattr(dora_convert, name)
        if inspect.isfunction(function):
            keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
            assert all(f"\n    {keyword.name}: " in function.__doc__ for keyword in keywords), name
            assert "--" not in function.__doc__, name
            assert dora_convert.__dict__[name] is function


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []

    def emit(self, record):
        self.seen.append((record.levelname, record.getMessage()))


def test_notices_are_logged(tmp_path, base, adapter):
    """Warnings and notices go to the log `dora_convert`, or to `on_notice` alone."""
    handler = Log()
    talk.logger.addHandler(handler)
    talk.logger.setLevel(logging.INFO)
    try:
        report = dora_convert.merge(base.path, adapter, tmp_path / "out", exclude="nothing_of_this_name", dry_run=False)
        noticed: list[str] = []
        dora_convert.merge(
            base.path, adapter, tmp_path / "again", exclude="nothing_of_this_name", on_notice=noticed.append
        )
    finally:
        talk.logger.removeHandler(handler)
        talk.logger.setLevel(logging.NOTSET)
    (warning,) = [text for level, text in handler.seen if level == "WARNING"]
    assert warning.startswith("exclude='nothing_of_this_name' matches no module")
    assert report.warnings == (warning,)
    assert any(level == "INFO" and text.startswith("device: ") for level, text in handler.seen)
    assert f"warning: {warning}" in noticed


def test_a_bar_appears_where_somebody_looks(tmp_path, base, adapter, monkeypatch):
    """In a notebook a bar moves, unless progress is off or the caller counts; elsewhere there is none."""
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(talk, "in_notebook", lambda: True)
    bars = []

    class Bar:
        n = 0

        def __init__(self, total):
            self.total = total
            bars.append(self)

        def update(self, step):
            self.n += step

        def close(self):
            self.closed = True

    monkeypatch.setattr(talk, "_new_bar", Bar)
    dora_convert.merge(base.path, adapter, tmp_path / "a", progress=False)
    dora_convert.merge(base.path, adapter, tmp_path / "b", on_progress=lambda *_: None)
    assert not bars
    dora_convert.merge(base.path, adapter, tmp_path / "c")
    (bar,) = bars
    assert bar.closed
    assert bar.n == bar.total > 0
    monkeypatch.setattr(talk, "in_notebook", lambda: False)
    dora_convert.merge(base.path, adapter, tmp_path / "d")
    assert len(bars) == 1


def test_a_notebook_is_known_by_its_kernel(monkeypatch):
    """IPython in a terminal is none."""

    class Shell:
        def __init__(self, *config):
            self.config = config

    for config, expected in (((), False), (("IPKernelApp",), True)):
        shell = Shell(*config)
        monkeypatch.setitem(
            sys.modules, "IPython", type("IPython", (), {"get_ipython": staticmethod(lambda s=shell: s)})
        )
        assert talk.in_notebook() is expected


def test_import_is_light():
    """`import dora_convert` and TAB import neither torch nor the room of the bar."""
    code = "import sys, dora_convert; dir(dora_convert); sys.exit(bool({'torch', 'dora_convert.api', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
