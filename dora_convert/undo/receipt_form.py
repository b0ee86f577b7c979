"""What the receipt of a merge is like, as `receipt` writes it: nothing else is believed, since it comes with somebody's model."""

from __future__ import annotations

import math

from ..storage.checkpoint import is_inside, is_plain
from ..storage.safetensors import BITS, CONFIG_DTYPES, MAX_ELEMENTS
from ..storage.schema import Either, count


def _shape(value: object) -> bool:
    """Whether a value is a shape of a tensor that a file can hold."""
    if not isinstance(value, list) or len(value) > 64 or not all(map(count, value)):
        return False
    return bool(math.prod(max(1, dimension) for dimension in value) <= MAX_ELEMENTS)


MAYBE = Either(str, None)
SOURCE = {"name": str, "repo?": MAYBE, "commit?": MAYBE}
HASHES = {"base?": MAYBE, "base_sha256?": str}
TENSOR = (str, frozenset(BITS), _shape)

FORM = {
    "versions": {str: str},
    "base": {"name": str, "repo": MAYBE, "commit": MAYBE},
    "adapters": [{**SOURCE, "kind": str, "weight": float, "files": {str: str}}],
    "options": {
        "dtype": Either(frozenset(CONFIG_DTYPES), None),
        "compute_dtype": str,
        "undo": {"none", "norms", "exact"},
        "include": [str],
        "exclude": [str],
        "ignore_field": [str],
    },
    "tensors": {str: {"fate": str, "of?": str, "written?": MAYBE, "undo?": [str], **HASHES}},
    "copied?": {str: str},
    "kept": {str: HASHES},
    "rounded?": {str: (MAYBE, count)},
    "layout": {
        "index": Either(is_plain, None),
        "shards": [{"name": is_plain, "metadata?": {str: str}, "tensors?": [TENSOR]}],
        "starts?": {str: count},
        "file?": bool,
        "config?": dict,
    },
    "side_files": {is_inside: str},
    "base_files": {is_inside: MAYBE},
    "ledger": [{"tensor": str, "fate": str, "into": [str], "why": str}],
}
"""See `schema` for what this means."""
