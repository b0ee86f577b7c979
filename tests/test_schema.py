"""report.schema.json describes every `--json` report: real ones fit, broken ones do not, and no field is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dora_convert

from .toy import make_adapter, make_base

SCHEMA = json.loads((Path(dora_convert.__file__).parent / "report.schema.json").read_text(encoding="utf-8"))
TYPES = {"string": str, "integer": int, "boolean": bool, "null": type(None), "array": list, "object": dict}


def faults(value, schema, where="$"):
    """Yield the faults of a value, by the few words of JSON Schema that the file uses; no other word may occur."""
    words = {"type", "properties", "required", "items", "additionalProperties", "anyOf", "enum", "const", "$ref"}
    assert schema.keys() <= words | {"description", "examples"}, schema
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema and all(list(faults(value, each)) for each in schema["anyOf"]):
        yield f"{where}: none of anyOf"
    if "type" in schema and not any(has_type(value, each) for each in listed(schema["type"])):
        yield f"{where}: {value!r} is not a {schema['type']}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{where}: {value!r}"
    if isinstance(value, dict):
        yield from (f"{where}.{name}: missing" for name in schema.get("required", ()) if name not in value)
        for name, each in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            yield from faults(each, inner, f"{where}.{name}")
    for number, each in enumerate(value if isinstance(value, list) else ()):
        yield from faults(each, schema.get("items", {}), f"{where}[{number}]")


def listed(value):
    return value if isinstance(value, list) else [value]


def has_type(value, name):
    if name == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, TYPES[name]) and (name != "integer" or not isinstance(value, bool))


def of(name):
    return {"$ref": f"#/$defs/{name}"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report of every class that needs no model code."""
    place = tmp_path_factory.mktemp("reports")
    base = make_base(place / "base")
    adapter, lora = make_adapter(place / "a", base, dora=True), make_adapter(place / "l", base, dora=False)
    out = place / "out"
    made = [
        dora_convert.merge(base.path, adapter, place / "x", dry_run=True),
        dora_convert.merge(base.path, adapter, out),
        dora_convert.unmerge(out, adapter, place / "again"),
        dora_convert.from_lora(base.path, lora, place / "dora"),
        dora_convert.to_lora(base.path, adapter, place / "lora", rank=2),
        dora_convert.to_lora(base.path, adapter, place / "y", rank=2, dry_run=True),
        dora_convert.extract(base.path, out, place / "extracted", rank=2),
        dora_convert.convert(adapter, place / "mlx", to="mlx"),
        dora_convert.verify(base.path, adapter, out),
        dora_convert.analyze(base.path, [adapter, lora]),
        dora_convert.inspect(adapter, base.path),
        dora_convert.inspect(out),
        dora_convert.push(out, "me/out", dry_run=True),
    ]
    return [(type(report).__name__, json.loads(json.dumps(report.to_dict()))) for report in made]


def test_real_reports_fit(reports):
    """Each is valid, also as any of all, and the schema names each of its fields but the details of fitting."""
    for name, report in reports:
        assert list(faults(report, of(name))) == []
        assert not list(faults(report, {"anyOf": SCHEMA["anyOf"]}))
        if not name.startswith("Made"):
            assert report.keys() == SCHEMA["$defs"][name]["properties"].keys()
    assert {each["$ref"].split("/")[-1] for each in SCHEMA["anyOf"]} == {name for name, _ in reports} | {
        "OutputsReport", "Error",
    }  # fmt: skip


def test_broken_reports_do_not_fit(reports):
    """A missing field, a wrong type and an unknown word are found."""
    by_name = dict(reports)
    verify = by_name["VerifyReport"]
    assert list(faults({**verify, "verdict": "maybe"}, of("VerifyReport"))) == ["$.verdict: 'maybe'"]
    assert list(faults({**verify, "modules": [1]}, of("VerifyReport"))) == ["$.modules[0]: 1 is not a object"]
    merge = {name: value for name, value in by_name["MergeReport"].items() if name != "lost"}
    assert list(faults(merge, of("MergeReport"))) == ["$.lost: missing"]
    assert list(faults({**by_name["MergeReport"], "resumed": 1}, of("MergeReport")))


def test_errors_fit(tmp_path, run):
    """So does the document on stderr."""
    code, _, err = run("merge", tmp_path / "none", tmp_path / "no", tmp_path / "out", "--json")
    assert code == 2
    assert list(faults(json.loads(err), of("Error"))) == []
    assert list(faults({"error": {"kind": "x"}}, of("Error")))
