"""Write docs/models.md from the rows that `python -m tests.oracles.families` has left in build/."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "models.md"
ROWS = ROOT / "build" / "families.jsonl"
MERGED = {"right", "refused", "wrong", "no load"}
OFF = 1e-3
"""OUT and the forward pass of base + adapter differ if their logits are so far apart."""
HEAD = """# Models

Names on disk are often not the names in the running model. The rules are transformers', for every model class that
transformers {version} can load. A table in the package holds them; transformers is not needed. [How names are
found](formats.md#names) has the rest.

Each family below is a tiny random model. PEFT makes adapters for it, all factors and magnitudes random: LoRA and DoRA
on the usual list of modules and on `all-linear`, LoRA on the head and on experts (`target_parameters`), and LoRA in the
names on disk, as transformers 4 had them. For images there are LoRA and DoRA on queries and values with a trained
classifier, too. The base lies in up to three layouts: as on the Hub, as transformers 5 saves it, and with the running
model's names. The merged folder is loaded by transformers. Each parameter is compared with PEFT's merge in float32.
Logits are compared, too, where text alone is enough for the model. Families with a part from timm were run beside it.

Together {right} of {merges} merges of {families} families are right. {refused} are refused with a reason, and
{wrong} differ from PEFT's merge.

| family | class | layouts | merges | right | not merged, or else |
|---|---|---|---|---|---|
"""
UNTESTED = """
## Not tested

The table has these families, too. They are not tested: transformers makes no tiny model of their default config, or
does not load what it saved, or PEFT makes no adapter for them.

| | families |
|---|---|
"""


def rows_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of merges by family; a family without a model or without adapters has none."""
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        families[row["family"]] += [row] if row["result"] in MERGED else []
    return dict(sorted(families.items()))


def line_of(family: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a family's line of the table."""
    right = sum(row["result"] == "right" for row in rows)
    layouts = ", ".join(dict.fromkeys(row["layout"] for row in rows))
    notes = "; ".join(dict.fromkeys(_notes(rows)))
    return f"| `{family}` | {rows[0]['model']} | {layouts} | {len(rows)} | {right} | {notes} |\n"


def _notes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["result"] == "refused":
            fault = row["why"].splitlines()[1].strip() if "\n" in row["why"] else row["why"]
            reason = re.sub(r"^\S+\s+", "", fault)
            general = re.sub(r"[.]\d+[.]", ".N.", reason)[:110].replace("|", "/")
            yield f"{row['adapter']} refused: {general}"
        elif row["result"] != "right":
            yield f"{row['adapter']} differs from PEFT's merge"
        if row["result"] == "right" and (row["forward"] or 0) > OFF:
            yield f"{row['adapter']}: the model reads a weight past its LoRA, so a merge differs from its forward pass"


def _listed(families: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table, one for each first letter."""
    for letter, names in groupby(families, key=lambda family: family[0]):
        yield f"| {letter} | {', '.join(f'`{name}`' for name in names)} |\n"


def main() -> int:
    """Write the page."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    found = rows_of(path)
    families = {family: rows for family, rows in found.items() if rows}
    untested = [family for family, rows in found.items() if not rows]
    every = [row for rows in families.values() for row in rows]
    results = [row["result"] for row in every]
    table = json.loads((ROOT / "dora_convert" / "naming" / "families.json").read_text(encoding="utf-8"))
    text = HEAD.format(
        version=table["transformers"],
        right=results.count("right"),
        merges=len(every),
        families=len(families),
        refused=results.count("refused"),
        wrong=len(results) - results.count("right") - results.count("refused"),
    )
    text += "".join(line_of(family, rows) for family, rows in families.items())
    PAGE.write_text(text + UNTESTED + "".join(_listed(untested)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
