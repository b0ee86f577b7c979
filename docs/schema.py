"""Write the JSON schema of every `--json` report from the classes of the reports, for docs/generate.py."""

from __future__ import annotations

import ast
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import dora_convert.reports as base
from dora_convert.errors import DoraConvertError
from dora_convert.plan.plan import Entry
from dora_convert.reports.analyze import AnalyzeReport
from dora_convert.reports.checkpoint import CheckpointReport
from dora_convert.reports.fitting import FittedModule, MadeDryRun, MadeReport
from dora_convert.reports.inspect import AdapterReport
from dora_convert.reports.merge import DryRunReport, MergeReport, UnmergeReport
from dora_convert.reports.push import Pushed, PushReport
from dora_convert.reports.verify import OutputsReport, VerifyReport

ADDRESS = "https://dora-convert.github.io/dora-convert/report.schema.json"
FITTING = ("from-lora", "to-lora", "extract", "convert")
COMMANDS: dict[type, tuple[str, ...]] = {
    MergeReport: ("merge",),
    UnmergeReport: ("unmerge",),
    DryRunReport: ("merge", "unmerge"),
    MadeReport: FITTING,
    MadeDryRun: FITTING,
    VerifyReport: ("verify",),
    OutputsReport: ("verify",),
    AnalyzeReport: ("analyze",),
    AdapterReport: ("inspect",),
    CheckpointReport: ("inspect",),
    PushReport: ("push",),
}
"""The reports, each with the commands that print it."""
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
SPREAD = (MadeReport, FittedModule)
"""Classes whose field `details` becomes fields of its own."""
LATER = {"Pushed": Pushed}
"""Names that a module of reports imports for type checkers alone."""


def schema() -> str:
    """Return the schema as JSON."""
    definitions: dict[str, Any] = {}
    for report in COMMANDS:
        define(report, definitions)
    definitions["Error"] = error()
    documents = [*(report.__name__ for report in COMMANDS), "Error"]
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ADDRESS,
        "title": "Reports of dora-convert",
        "description": "A document that --json prints on stdout, or on stderr for an error. Fields may be added.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in documents],
        "$defs": dict(sorted(definitions.items())),
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def error() -> dict[str, Any]:
    """Return the schema of the document on stderr."""
    text = {"type": "string"}
    fault = {"type": "object", "required": ["what", "why"], "properties": {"what": text, "why": text}}
    kinds = sorted({each.kind for each in descendants(DoraConvertError)})
    body = {
        "type": "object",
        "required": ["kind", "message", "hint"],
        "properties": {
            "kind": {"type": "string", "examples": kinds},
            "message": text,
            "hint": {"type": ["string", "null"], "description": "The next command to type."},
            "faults": {"type": "array", "items": fault},
        },
    }
    return {"description": "An error.", "type": "object", "required": ["error"], "properties": {"error": body}}


def descendants(kind: type) -> Iterator[Any]:
    """Yield a class and every class derived from it."""
    yield kind
    for each in kind.__subclasses__():
        yield from descendants(each)


def define(kind: type, definitions: dict[str, Any]) -> dict[str, str]:
    """Add the schema of a dataclass or a Struct to the definitions; return a reference to the schema."""
    name = kind.__name__
    if name not in definitions:
        definitions[name] = {}  # a class that holds itself ends here
        hints = get_type_hints(kind, localns=LATER)
        comments = comments_of(kind)
        properties = {}
        if kind in COMMANDS:
            properties = {"schema": {"const": base.SCHEMA}, "version": {"type": "string"}}
        names = [field.name for field in fields(kind)] if is_dataclass(kind) else kind.__struct_fields__
        for field in names:
            if field == "details" and kind in SPREAD:
                continue
            properties[field] = described(kind, field, hints[field], definitions) | comments.get(field, {})
        definitions[name] = {
            "description": " ".join(str(inspect.getdoc(kind)).split()),
            "type": "object",
            "required": list(properties),
            "properties": properties,
        }
    return {"$ref": f"#/$defs/{name}"}


def described(kind: type, name: str, hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field; some have more to say than their type."""
    if name == "command" and kind in COMMANDS:
        return {"enum": list(COMMANDS[kind])}
    if name == "ledger":
        return {"type": "array", "items": define(Entry, definitions)}
    if name == "outputs":
        return {"anyOf": [define(OutputsReport, definitions), {"type": "null"}]}
    if name == "level":
        return {"const": kind.level}  # type: ignore[attr-defined]
    if name == "dry_run" and kind is not PushReport:
        return {"const": True}
    return of_type(hint, definitions)


def of_type(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type."""
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if is_dataclass(hint):
        return dict(define(hint, definitions))
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [of_type(each, definitions) for each in inner]}
    if origin is tuple:
        return {"type": "array", "items": of_type(inner[0], definitions)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        values = of_type(inner[1], definitions)
        return {"type": "object", "additionalProperties": values} if values else {"type": "object"}
    if hint is Any:
        return {}
    raise TypeError(f"no schema for {hint}")


def comments_of(kind: type) -> dict[str, dict[str, Any]]:
    """Return for each field its docstring, and the values that its comment lists as in `# agree | differ`."""
    found: dict[str, dict[str, Any]] = {}
    for owner in reversed(kind.__mro__[:-1]):
        if not is_dataclass(owner):
            continue
        source = inspect.getsource(owner)
        body = ast.parse(inspect.cleandoc(source)).body[0].body  # type: ignore[attr-defined]
        for field, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(field, ast.AnnAssign):
                continue
            name = ast.unparse(field.target)
            listed = re.search(rf"^ +{name}: str  # ([\w-]+(?: \| [\w-]+)+)$", source, re.MULTILINE)
            facts: dict[str, Any] = {"enum": listed[1].split(" | ")} if listed else {}
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                facts["description"] = " ".join(str(after.value.value).split())
            found[name] = facts
    return found
