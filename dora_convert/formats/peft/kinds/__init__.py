"""Read PEFT's adapters that are not LoRA. A kind is an entry of one of the files beside this one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ....adapters import Change, Update
from ....adapters.kinds import Follows
from ....errors import Fault, UnsupportedError
from ....storage.safetensors import FLOATS, StoredTensor
from ..config import Config
from ..forms import EMPTY
from . import computed, products, rotating
from .kind import ALWAYS, Fields, Kind, KindModule

KINDS: Mapping[str, Kind] = {**products.KINDS, **rotating.KINDS, **computed.KINDS}
_COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "layers_pattern", "layers_to_transform",
    "modules_to_save", "peft_type", "peft_version", "revision", "target_modules", "task_type",
)  # fmt: skip
"""The config fields that kinds share with LoRA."""


class KindReader:
    """Reads one adapter of a kind."""

    def __init__(self, kind: Kind, raw: Mapping[str, Any], path: Path) -> None:
        self.kind = kind
        common = {name: raw[name] for name in _COMMON if name in raw}
        if str(common.get("bias")).endswith("_only"):  # oft_only, boft_only, …
            common["bias"] = "lora_only"
        if "alpha" in kind.fields:
            common |= {name: raw[name] for name in ("r", "rank_pattern", "alpha_pattern") if name in raw}
            common |= {"lora_alpha": raw["alpha"]} if "alpha" in raw else {}
        self.config = Config.parse(common, path)
        self._fields = Fields(raw, self.config)
        self._shared: dict[str, StoredTensor] = {}

    def refuse(self, name: str, accepted: Collection[str]) -> None:
        """Refuse the adapter `name` for a reason of its kind, or for fields that nobody accepted."""
        if why := self.kind.refuse(self._fields):
            raise UnsupportedError(f"The adapter {name}: {why}.")
        known = {*ALWAYS, *self.kind.fields, *accepted}
        unknown = [field for field, value in self._fields.raw.items() if value and field not in known]
        if unknown:
            raise UnsupportedError(
                f"The adapter {name} uses what this version does not merge.",
                faults=[Fault(field, "a field this version does not know") for field in unknown],
                hint="--ignore-field NAME accepts a field that you know to change nothing",
            )

    def keeps(self, name: str, tensor: StoredTensor) -> bool:
        """Keep a tensor that all modules share; return False for any other."""
        role = self.kind.shared.get(name)
        self._shared |= {role: tensor} if role else {}
        return role is not None

    def updates_of(
        self,
        modules: Mapping[str, Mapping[str, StoredTensor]],
        saved: Collection[str],  # noqa: ARG002 - no kind moves the base
        config: Config,  # noqa: ARG002 - the reader has it
    ) -> Iterator[Change | Fault]:
        """Yield every module's changes, or its fault."""
        for name, own in modules.items():
            parts = {**self._shared, **own}
            outcome = self._update(name, parts)
            if isinstance(outcome, str):
                yield Fault(name, outcome)
                continue
            yield Change(f"{name}.weight", outcome, rule=self.kind.rule(self._fields, name))
            if self.kind.scales_bias and getattr(outcome, "axis", "") == "rows":
                yield Change(f"{name}.bias", Follows(f"{name}.weight"))

    def _update(self, name: str, parts: Mapping[str, StoredTensor]) -> Update | str:
        missing = [role for role in self.kind.needed if role not in parts]
        if missing:
            ends = [end for end, role in self.kind.parts.items() if role == missing[0]]
            return f"has no {ends[0].lstrip('.')}"
        for role, tensor in parts.items():
            if 0 in tensor.shape:
                return f"its {tensor.name.rpartition('.')[2]} {EMPTY}"
            if tensor.dtype not in FLOATS and role != "index":
                return f"is stored as {tensor.dtype}; adapters of that dtype are not merged"
        return self.kind.make(KindModule(name, parts, self._fields))


def find_kind(raw: Mapping[str, Any], path: Path) -> KindReader | None:
    """Return the reader of an adapter's kind; None for a kind that is not merged."""
    kind = KINDS.get(str(raw.get("peft_type")).upper())
    return KindReader(kind, raw, path) if kind else None
