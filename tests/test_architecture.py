"""The arrows of docs/design.md: who may import whom, who may know what, and how long anything may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dora_convert"
FILES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

ORDER = [
    "errors", "hub/visit", "schema", "adapters/__init__", "checking/__init__", "hub/__init__",
    "outputs/__init__", "reverse/__init__", "sizes", "stored", "reader", "json_files", "pickled", "refs",
    "updates", "blocks", "items", "reverse/refusals", "checkpoint", "ties", "adapter", "adapters/outgoing",
    "formats/peft_fields", "formats/peft_types", "formats/peft_config", "formats/peft_modules",
    "formats/peft_names", "formats/peft_save", "formats/peft", "formats/__init__", "names", "placing",
    "plan", "layout", "replicas", "configs", "draft", "planner", "adapters/orders", "settings", "journal",
    "hub/memo", "undo", "hub/answers", "digests", "hub/origin", "hub/fetch", "hub/remote", "gather", "card",
    "reverse/receipt_form", "reverse/record", "sidefiles", "writer", "folder", "maths", "adapters/factoring",
    "memory", "precision", "lane", "operands", "checks", "reverse/packing", "reverse/inverse",
    "reverse/keeping", "checking/ulps", "checking/rows", "reverse/recover", "make", "checking/expected",
    "reverse/expected_base", "checking/selfcheck", "progress", "reverse/in_place", "execute", "receipt",
    "reverse/unmerging", "hub/pushed", "report", "inspected", "census", "inspection", "workspace",
    "hub/upload", "hub/sending", "hub/arrivals", "hub/routes", "hub/traffic", "running", "checking/verified",
    "reverse/rehearsal", "produce", "adapters/craft", "adapters/made", "adapters/magnitudes",
    "checking/parity", "checking/causes", "checking/differences", "checking/figures", "checking/page",
    "checking/verification", "heavy", "hub/parcel", "hub/pushing", "adapters/making", "verbs/__init__",
    "extras", "outputs/difference", "outputs/kept", "outputs/halfulp", "outputs/sizing", "outputs/passes",
    "outputs/prompts", "outputs/samples", "outputs/offload", "outputs/models", "outputs/comparison",
    "merging", "verbs/merge", "verbs/inspect", "checking/recorded", "verbs/verify", "verbs/from_lora",
    "reverse/restoring", "reverse/removal", "verbs/unmerge", "verbs/push", "adapters/factoring_scales",
    "adapters/factoring_dora", "adapters/compress", "verbs/to_lora", "adapters/pairs", "adapters/extraction",
    "verbs/extract", "__init__", "cli/sink", "cli/options", "cli/merge", "cli/made", "cli/from_lora",
    "cli/inspect", "cli/verify", "cli/__init__", "cli/unmerge", "cli/push", "cli/to_lora", "cli/extract",
    "__main__",
]  # fmt: skip
"""Every module comes after all that it imports."""

COMPUTES = {
    "maths",
    "adapters/factoring",
    "memory",
    "precision",
    "lane",
    "operands",
    "checks",
    "reverse/packing",
    "reverse/inverse",
    "reverse/keeping",
    "checking/ulps",
    "checking/rows",
    "reverse/recover",
    "make",
    "checking/expected",
    "reverse/expected_base",
    "checking/selfcheck",
    "progress",
    "execute",
    "receipt",
    "workspace",
    "running",
    "reverse/rehearsal",
    "produce",
    "adapters/craft",
    "adapters/magnitudes",
    "checking/parity",
    "checking/causes",
    "checking/verification",
    "outputs/difference",
    "outputs/kept",
    "outputs/halfulp",
    "outputs/sizing",
    "outputs/passes",
    "outputs/samples",
    "outputs/offload",
    "outputs/models",
    "outputs/comparison",
    "reverse/restoring",
    "adapters/factoring_scales",
    "adapters/factoring_dora",
    "adapters/compress",
    "adapters/extraction",
}
"""The only modules that import torch when they are imported; a plan is made without any of them."""

TALKS = {"click", "rich", "tqdm"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 50


def imports(name: str, *, late: bool) -> set[str]:
    """Top-level names of what a module imports: dotted for others, paths for our own; `late` ones are in functions."""
    found: set[str] = set()
    tree = TREES[name]
    early = {id(node) for node in _at_import(tree)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and (late or id(node) in early):
            found |= _names(name, node)
    return found


def _at_import(tree: ast.AST):
    """Statements that run at import; the body of `if TYPE_CHECKING` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
            yield from _at_import(node)


def _names(name: str, node: ast.Import | ast.ImportFrom) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if not node.level:
        return {node.module.partition(".")[0]}
    package = name.split("/")[:-1]
    parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
    found = set()
    for alias in node.names:
        for path in ("/".join([*parts, alias.name]), "/".join(parts), "/".join([*parts, "__init__"])):
            if path in FILES:
                found.add(path)
                break
    return found


def test_every_module_has_its_place():
    """The order lists every module once."""
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    """A module imports only what comes before it; no cycles, not even hidden in functions."""
    before = set(ORDER[: ORDER.index(name)])
    allowed_late = {"__init__"}  # __version__, and the package's own lazy names
    if name == "adapter":
        allowed_late |= {"formats/__init__"}  # the one tuple that knows its members
    ours = {found for found in imports(name, late=True) if found in FILES}
    assert ours - before - allowed_late == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_torch_is_imported_where_it_computes(name):
    """Planning, help and errors do without it."""
    heavy = {"torch", "safetensors", "huggingface_hub", *COMPUTES - {name}}
    if name not in COMPUTES:
        assert imports(name, late=False) & heavy == set()


@pytest.mark.parametrize("name", sorted(FILES))
def test_only_the_command_line_talks(name):
    """click, rich and tqdm belong to cli; nothing imports cli, but __main__."""
    if not name.startswith("cli/"):
        assert imports(name, late=True) & TALKS == set()
        assert name == "__main__" or not any(found.startswith("cli/") for found in imports(name, late=True))


@pytest.mark.parametrize(
    ("name", "never"),
    [
        ("maths", set(FILES)),
        ("errors", set(FILES)),
        ("stored", set(FILES) - {"errors"}),
        ("updates", set(FILES) - {"stored"}),
        ("items", set(FILES) - {"stored", "updates", "blocks"}),
        ("placing", set(FILES) - {"stored", "updates"}),
        ("checkpoint", {"adapter", "names", "plan", "updates"}),
        ("adapter", {"checkpoint", "names", "plan"}),
        ("planner", {"execute", "writer", "lane"}),
        ("plan", {"formats/peft", "names", "execute", "writer"}),
        ("writer", {"adapter", "updates", "names", "formats/peft"}),
        ("execute", {"formats/peft", "names", "adapter"}),
        ("checking/selfcheck", {"make", "operands", "lane", "maths", "writer"}),
        ("checking/parity", {"make", "operands", "lane", "maths", "writer"}),
        ("checking/causes", {"make", "operands", "lane", "maths", "writer"}),
        ("checking/expected", {"make", "operands", "lane", "maths", "writer"}),
    ],
)
def test_who_may_know_what(name, never):
    """The table of docs/design.md."""
    assert imports(name, late=True) & (never - {name, "__init__"}) == set()


def test_formats_do_not_know_each_other():
    """Nor items, names or plans."""
    formats = {name for name in FILES if name.startswith("formats/") and not name.endswith("__init__")}
    for name in formats:
        family = name.partition("_")[0]  # a format may have several files
        parts = {other for other in formats if other.partition("_")[0] == family}
        assert imports(name, late=True) & (formats - parts | {"items", "names", "plan", "planner"}) == set()


def test_no_prints():
    """The sink is the only one who writes to a stream."""
    for name, tree in TREES.items():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), name


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_long(name):
    """Files end within 300 lines, functions within 50."""
    assert len(FILES[name].read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{name}: {node.name}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_everything_public_is_documented(name):
    """A docstring for each module, class and function without an underscore."""
    tree = TREES[name]
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            nested = any(
                node in ast.walk(other)
                for other in ast.walk(tree)
                if isinstance(other, ast.FunctionDef) and other is not node
            )
            assert nested or ast.get_docstring(node), f"{name}: {node.name}"
