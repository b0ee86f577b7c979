"""Hold the rules for prose and names of CONTRIBUTING.md, as far as a machine can check them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dora_convert"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
PAGES = [
    path
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
    if path.stem not in ("cli-reference", "api", "changelog")
]
LONGEST_LINE, LONGEST_SENTENCE = 120, 35

OPENING = re.compile(r"(?:What|Whether|Where|How)\b")
ABSENCE = re.compile(r"\bis no (?!longer\b|more\b|different\b|less\b)|\bis there\b")
"""Words of a message that say "is not a valid X", "not found" or "does not exist" in a harder way."""

CLASSES = {"Arrivals", "Choice", "Done", "Draft", "Fit", "Lane", "Misfit", "Stored"}
MODULES = {
    *("arrivals", "craft", "made", "make", "making", "memo", "merging", "origin", "outputs", "parcel", "placing"),
    *("produce", "restoring", "running", "traffic", "visit"),
}
IDENTIFIERS = {"arrivals", "craft", "making", "memo", "parcel", "produce", "there", "told", "traffic"}
"""Names that the glossary has replaced: of classes, of files and folders, and of functions and variables."""


def docstrings(tree: ast.AST):
    """Yield line and text of every docstring, those of fields and constants included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for statement in body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield statement.lineno, value.value


def identifiers(tree: ast.AST):
    """Yield every name that a file binds: classes, functions, parameters, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def sentences(text: str) -> list[str]:
    """Return the sentences of a page; tables, code, headings and equations are not prose."""
    text = re.sub(r"^```.*?^```|^    .*?$|^\|.*?$|^#.*?$|^---$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |(?<=[.!?:])[*)\"]*\s+", text)
    return [part.strip(' \n*-"') for part in parts if part.strip()]


@pytest.mark.parametrize("name", FILES)
def test_docstrings_begin_with_a_fact(name):
    """No docstring begins with What, Whether, Where or How, and no sentence in one begins with Whether."""
    assert [(line, text) for line, text in docstrings(TREES[name]) if OPENING.match(text)] == []
    assert [line for line, text in docstrings(TREES[name]) if re.search(r"[.!?]\s+Whether\b", text)] == []


@pytest.mark.parametrize("name", FILES)
def test_old_names_are_gone(name):
    """Classes, functions, variables, files and folders have the names of the glossary."""
    assert set(Path(name).with_suffix("").parts) & MODULES == set()
    names = set(identifiers(TREES[name]))
    assert names & CLASSES == set()
    assert {found.lstrip("_") for found in names} & IDENTIFIERS == set()


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short(name):
    """Code, comments and docstrings keep to one width."""
    lines = FILES[name].read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize("name", FILES)
def test_messages_say_not_found(name):
    """No text of the program says "is no X" or "is there"; docstrings are not texts of the program."""
    documentation = {text for _, text in docstrings(TREES[name])}
    texts = [node.value for node in ast.walk(TREES[name]) if isinstance(node, ast.Constant)]
    messages = [text for text in texts if isinstance(text, str) and text not in documentation]
    assert [text for text in messages if ABSENCE.search(text)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_plain(page):
    """Sentences of the documentation are short and none begins with What, Whether, Where or How."""
    found = sentences(page.read_text(encoding="utf-8"))
    assert [text for text in found if OPENING.match(text) and not text.endswith("?")] == []
    assert [text for text in found if len(text.split()) > LONGEST_SENTENCE] == []
