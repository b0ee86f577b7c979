"""Hold the floors of docs/design.md: who may import whom, who may import torch, and how long anything may be."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dora_convert"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
ROOMS = sorted({name.partition("/")[0] for name in FILES if "/" in name})

FLOORS = [
    "cli",
    "integrations",
    "api",
    "verbs",
    "analysis",
    "fitting",
    "undo",
    "logits",
    "parity",
    "hub",
    "reports",
    "cluster",
    "engine",
    "output",
    "sources",
    "plan",
    "naming",
    "codecs",
    "formats",
    "adapters",
    "storage",
    "maths",
    "",
]
"""Rooms from the roof to the ground; a room imports only from the rooms below it. The last are the top-level files."""

NEVER = {
    "maths": {room for room in FLOORS if room != "maths"},
    "formats": {"plan", "naming"},
    "engine": {"hub", "undo", "parity"},
    "cluster": {"hub", "undo", "parity"},
    "parity": {"maths"},
    "hub": {"parity"},
}
"""Rooms that a room knows nothing of, although they lie below it, or where it matters most."""

FREE_OF_TORCH = {
    "storage",
    "plan",
    "naming",
    "codecs",
    "formats",
    "adapters",
    "sources",
    "output",
    "reports",
    "cli",
    "api",
    "",
}
"""Rooms that import no torch when they are imported: headers are planned without it."""

TALKS = {"click", "rich", "tqdm"}
MAY_TALK = {"cli": TALKS, "api": {"tqdm"}}
"""The rooms that face people: a bar belongs to Python, too (api), the rest to the command line alone."""
TOP_LEVEL = 10
LONGEST_FILE, LONGEST_FUNCTION = 300, 50
MOST_POSITIONAL = 5
ARITHMETIC = {"engine/tensor", "engine/factors", "engine/device_buffers", "engine/run"}


def room(name: str) -> str:
    """Return the room of a file; "" for the top level."""
    return name.partition("/")[0] if "/" in name else ""


@cache
def imports(name: str, *, late: bool) -> frozenset[str]:
    """Return what a file imports: paths of our own files, first names of other packages; `late` ones, too."""
    found: set[str] = set()
    statements = ast.walk(TREES[name]) if late else at_import(TREES[name])
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= set(targets(name, node))
    return frozenset(found)


def at_import(tree: ast.AST):
    """Yield the statements that run at import; the body of `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from at_import(node)


def targets(name: str, node: ast.ImportFrom):
    """Yield the files that one statement imports, or the package's first name."""
    if not node.level:
        yield node.module.partition(".")[0]
        return
    package = name.split("/")[:-1]
    parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    for alias in node.names:
        paths = ("/".join([*parts, alias.name]), "/".join(parts), "/".join([*parts, "__init__"]))
        yield next(path for path in paths if path in FILES)


def ours(name: str) -> set[str]:
    """Return the files of ours that a file imports at any time."""
    return {found for found in imports(name, late=True) if found in FILES}


def test_every_room_has_a_floor():
    """A new folder takes its place in FLOORS."""
    assert sorted(FLOORS) == sorted([*ROOMS, ""])
    assert len([name for name in FILES if not room(name)]) <= TOP_LEVEL


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_arrow_back_up(name):
    """A file imports from its own room and from those below it, not even inside a function from above."""
    if name in ("__init__", "__main__"):
        return
    below = set(FLOORS[FLOORS.index(room(name)) :])
    assert [found for found in ours(name) if room(found) not in below] == []
    assert "__init__" not in ours(name)  # the package's face stands above the verbs


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_circles(name):
    """No file reaches itself through imports."""
    seen, todo = set(), [name]
    while todo:
        for found in ours(todo.pop()) - seen - {"__init__"}:
            seen.add(found)
            todo.append(found)
    assert name not in seen


@pytest.mark.parametrize("name", sorted(FILES))
def test_who_may_know_what(name):
    """The table of docs/design.md."""
    assert {room(found) for found in ours(name) - {"__init__"}} & NEVER.get(room(name), set()) - {""} == set()
    if room(name) == "parity":
        assert ours(name) & ARITHMETIC == set()


def test_formats_do_not_know_each_other():
    """A format imports `formats/` files of its own only."""
    for name in FILES:
        if name.startswith("formats/") and name != "formats/detect":
            mine = name.split("/")[1]
            assert {found.split("/")[1] for found in ours(name) if room(found) == "formats"} <= {mine}


@pytest.mark.parametrize("name", sorted(FILES))
def test_torch_is_imported_where_it_computes(name):
    """Planning, help and errors do without torch, and so does everything that they import."""
    if room(name) not in FREE_OF_TORCH:
        return
    seen, todo = set(), [name]
    while todo:
        for found in imports(todo.pop(), late=False) - seen:
            seen.add(found)
            todo += [found] if found in FILES else []
    assert seen & {"torch", "safetensors", "huggingface_hub"} == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_only_the_command_line_talks(name):
    """click and rich belong to cli, tqdm to cli and api; nothing imports cli but __main__, and nothing prints."""
    assert imports(name, late=True) & TALKS <= MAY_TALK.get(room(name), set())
    calls = [node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert not any(isinstance(called, ast.Name) and called.id == "print" for called in calls)


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_long(name):
    """Files end within 300 lines, functions within 50."""
    assert len(FILES[name].read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name}: {node.name}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_calls_name_their_arguments(name):
    """No call passes more than five positional arguments; a reader cannot tell more of them apart."""
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if len(call.args) > MOST_POSITIONAL] == []


def test_class_names_occur_once():
    """A reader who searches for a class finds one."""
    names = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
