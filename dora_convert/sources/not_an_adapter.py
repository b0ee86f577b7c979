"""Say what a folder is that is not an adapter."""

from __future__ import annotations

from ..errors import RefError
from ..formats.detect import ANCHORS, adapters_inside, detect
from ..storage.refs import Source

CONTENTS = "docs/formats.md lists the formats that are read"


def error_for(source: Source) -> RefError:
    """Return an error that says what the folder is instead, and where the adapter might be."""
    root, lacking = source.path, f"has no {ANCHORS[0]}, and no other file of an adapter of a known format"
    if root.is_file() and detect(root.parent):
        return RefError(f"ADAPTER {source.address} is a file; name the folder it lies in.", hint=str(root.parent))
    if root.is_file():
        from ..storage.file_view import read_any

        read_any(root)  # says what is damaged
        return RefError(f"ADAPTER {source.address} is not an adapter of a known format.", hint=CONTENTS)
    if below := adapters_inside(root):
        return RefError(
            f"ADAPTER {source.address} {lacking}, but these folders inside it do: {', '.join(below[:10])}.",
            hint=f"name one of them, such as {root / below[-1]}",
        )
    if (root / "config.json").exists():
        return RefError(
            f"ADAPTER {source.address} is a model, not an adapter: it {lacking}.",
            hint="--method linear, ties, dare and their like combine fine-tuned models, too",
        )
    return RefError(f"ADAPTER {source.address} {lacking}.", hint=CONTENTS)
