"""The documentation matches the code: commands and examples run, links work, the reference is current."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dora_convert
from dora_convert.cli import COMMANDS, main

from .toy import edit_json, make_adapter, make_base

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with `base`, adapters and fine-tunes, by the names of the documentation."""
    base = make_base(tmp_path / "base")
    for seed, name in enumerate(("adapter", "lora", "style", "facts", "sft", "dpo")):
        adapter = make_adapter(tmp_path / name, base, dora=name in ("adapter", "style"), seed=seed)
        edit_json(adapter / "adapter_config.json", base_model_name_or_path="base")
    dora_convert.merge(base.path, tmp_path / "adapter", tmp_path / "tuned")
    for name in ("tuned-a", "tuned-b"):
        shutil.copytree(tmp_path / "tuned", tmp_path / name)
    (tmp_path / "outputs").mkdir()
    trained = make_adapter(tmp_path / "outputs/checkpoint-500", base, dora=False)
    edit_json(trained / "adapter_config.json", base_model_name_or_path="unsloth/base-bnb-4bit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_runs(page, place):
    """Every Python block runs as it stands."""
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_run(page, place, monkeypatch):
    """Every command of a console block succeeds."""
    for block in blocks(page, "console"):
        for line in block.splitlines():
            words = shlex.split(line)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                monkeypatch.setenv(*words.pop(0).split("=", 1))
            if words[:1] == ["dora-convert"]:
                with pytest.raises(SystemExit) as left:
                    main(words[1:])
                assert left.value.code == 0, line


NEED_OTHERS = ("cluster", "object-stores")
"""Guides whose commands need a cluster or a store; `make cluster` runs their like."""


@pytest.mark.parametrize("page", sorted((ROOT / "docs/guides").glob("*.md")), ids=lambda page: page.name)
def test_every_block_of_a_guide_runs_somewhere(page):
    """console and python run here, bash and py in `make guides`; a cluster's commands need a cluster."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for language, text in fences:
        assert language in {"console", "python", "bash", "py", "yaml"} or (
            language == "sh" and page.stem in NEED_OTHERS
        ), text
        if language == "console":
            assert all(re.match(r"([A-Z_]+=\S* )?dora-convert ", line) for line in text.splitlines()), text
        if language == "yaml":
            inputs = (ROOT / "action.yml").read_text(encoding="utf-8")
            assert all(
                f"\n  {name}:" in inputs
                for name in re.findall(r"^          ([\w-]+): ", text, re.MULTILINE)
                if name != "HF_TOKEN"
            )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    """Every relative link names a file, and so does every address in this repository; README has no other kind."""
    text = page.read_text(encoding="utf-8")
    relative = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    for target in relative:
        assert (page.parent / target).exists(), target
    for target in re.findall(r"dora-convert/dora-convert/(?:blob/)?main/([^)#\s]+)", text):
        assert (ROOT / target).exists(), target
    assert page.name != "README.md" or not relative  # PyPI shows it, too


def test_reference_is_current():
    """docs/cli-reference.md is what --help prints; `make format` writes it."""
    done = subprocess.run([sys.executable, ROOT / "docs/generate.py", "--check"], check=False)
    assert done.returncode == 0


def test_every_command_is_documented():
    """In the README's table and with a section of its own in docs/cli.md."""
    for name in COMMANDS:
        assert f"`dora-convert {name} " in (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"\n## {name}\n" in (ROOT / "docs/cli.md").read_text(encoding="utf-8")
        assert f"\n## {name}\n" in (ROOT / "docs/python.md").read_text(encoding="utf-8")


def test_every_option_is_in_the_reference():
    """Nothing can be asked for that is not documented."""
    reference = (ROOT / "docs/cli-reference.md").read_text(encoding="utf-8")
    for option in ("--weight", "--device", "--max-memory", "--undo", "--json", "--allow-unmatched"):
        assert option in reference


def test_readme_is_short():
    """Under six hundred words, the first command before line 25."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 600
    assert "$ dora-convert merge" in "\n".join(text.splitlines()[:25])


def test_every_page_is_in_the_index():
    """docs/index.md leads to every page."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs").as_posix()
        assert path == "index.md" or f"({path})" in index, path


def test_the_site_leads_to_every_page():
    """mkdocs.yml has every page in its navigation."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in site, page


def test_messages_of_troubleshooting_exist():
    """Every message that the page explains is in the code, but for the names and numbers in it."""
    page = (ROOT / "docs/guides/troubleshooting.md").read_text(encoding="utf-8")
    code = re.sub(
        r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dora_convert").rglob("*.py"))
    )
    messages = re.findall(r"\*([^*`]{8,})\*", "\n".join(re.findall(r"^\| (\*.*?) \|", page, re.MULTILINE)))
    assert len(messages) > 15
    for message in messages:
        for part in re.split(r"…|\bN\b|\d+%?", message):
            assert part.strip(" .,") in code, message


def test_glossary_names_exist():
    """Every class and every folder that the glossary names is in the package."""
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "dora_convert").rglob("*.py"))
    for name in re.findall(r"`([A-Z][a-z]+[A-Za-z]*)`", text):
        assert f"\nclass {name}" in code, name
    for folder in re.findall(r"`([a-z]+)/`", text):
        assert (ROOT / "dora_convert" / folder).is_dir(), folder


def test_equations_are_in_order():
    """docs/mathematics.md has every equation that maths/lora.py numbers."""
    numbered = re.findall(r"\((\d)\),", (ROOT / "dora_convert/maths/lora.py").read_text(encoding="utf-8"))
    assert numbered == sorted(numbered)
    page = (ROOT / "docs/mathematics.md").read_text(encoding="utf-8")
    assert all(f"**({number})" in page for number in numbered)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_have_their_outputs(path):
    """`make notebooks` has run every cell of code in order, without an error; no path of a machine is in the outputs."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps([cell["outputs"] for cell in cells]))


@pytest.mark.parametrize("name", ["lora-to-dora", "several-adapters"])
def test_notebooks_run(name, tmp_path, monkeypatch):
    """Every cell runs; `make notebooks` runs training-moves, which needs the trainings of `make figures`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
