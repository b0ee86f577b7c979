r"""Read diffusers' LoRA files, `pytorch_lora_weights.safetensors`, and those of ai-toolkit, which have the same names.

Names are `<component>.<module>` and an end; components are unet, transformer, text_encoder, text_encoder_2, ….
The ends, for a weight of (out, in, k…):

    .lora_A.weight  .lora.down.weight  .lora_linear_layer.down.weight    (r, in, k…)
    .lora_B.weight  .lora.up.weight    .lora_linear_layer.up.weight      (out, r, 1…)
    .lora_magnitude_vector  .lora_magnitude_vector.weight  .magnitude    (out) or (1, out, 1…): always by rows
    .alpha  ()        .lora_B.bias  (out)        .dora_scale             as in kohya's files
    .processor.to_q_lora.down.weight                                     before diffusers 0.18: of the module to_q

The header's `lora_adapter_metadata` holds PEFT's config for each component, such as `unet.lora_alpha`. Without it,
and without `.alpha`, s is 1, or as the caller says. ai-toolkit never stores alpha. Its norm is that of W + BA, and
what s adds to BA is outside.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ...adapters import NOTHING, Adapter, Change, Decomposed, Delta, LowRank, Waived
from ...adapters.facts import ScalingOrOne, scaled_outside
from ...adapters.parts import Findings, Parts, flat, read_number, sort_parts, wrong_parts
from ...storage.file_view import FileView
from ...storage.refs import Source
from ...storage.safetensors import StoredTensor

if TYPE_CHECKING:
    from ...adapters.new_adapter import Writer

NAME = LIBRARY = "diffusers"
TAKES = ("alpha", "scaling")
FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
OF_AI_TOOLKIT = ".magnitude"
ENDS: Mapping[str, str] = {
    ".lora_A.weight": "A", ".lora.down.weight": "A", ".lora_linear_layer.down.weight": "A",
    ".lora_B.weight": "B", ".lora.up.weight": "B", ".lora_linear_layer.up.weight": "B",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B",
    ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m", ".magnitude": "m", ".dora_scale": "scale",
    ".alpha": "alpha", ".lora_B.bias": "b",
}  # fmt: skip
COMPONENTS = r"(unet|transformer(_2)?|text_encoder(_\d)?|text_encoders|diffusion_model|prior|controlnet|vae)"
_MARK = re.compile(
    rf"^{COMPONENTS}\.(?!h\.\d).*\.(lora_A(\.default)?|lora|lora_linear_layer|\w+_lora)(\.down)?\.weight$"
)
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
_ONE_TRAINER = re.compile(r"^ot_")


def recognises(view: FileView) -> bool:
    """Return True for a file with diffusers' names."""
    return FILE in view.names or view.find(_is_diffusers) is not None


def _is_diffusers(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(_MARK.match(name) for name in tensors)


def read(source: Source, waived: Waived = NOTHING) -> Adapter:
    """Read a file's header and its alphas.

    Raises RefError if a folder has several such files, UsageError if the caller says an alpha that no module lacks.
    """
    view = FileView.of(source.path)
    file = FILE if FILE in view.names else view.only(_is_diffusers, source.name)
    header = view.need(file)
    tensors = {_modern(name): tensor for name, tensor in header.tensors.items()}
    modules, rest = sort_parts(tensors, ENDS)
    findings, config, otherwise = Findings(), ComponentConfig(header.metadata), ScalingOrOne(waived.facts)
    for module, parts in modules.items():
        _read_module(module, parts, partial(_scaling, module, parts, config, otherwise), findings)
    otherwise.refuse_needless()
    findings.fault(rest.values(), "is not part of a LoRA in diffusers' form")
    is_dora = any(isinstance(change.update, Decomposed) for change in findings.changes)
    return findings.adapter(
        view,
        [file],
        source,
        format=NAME,
        kind="DoRA" if is_dora else "LoRA",
        maker=_maker(header.metadata),
        base=config.base,
        warnings=otherwise.warnings(source),
        naming="components",
    )


def _modern(name: str) -> str:
    """Return the name that today's diffusers gives a tensor of an attention processor."""
    if not (match := _PROCESSOR.fullmatch(name)):
        return name
    module = "to_out.0" if match[2] == "to_out" else match[2]
    return f"{match[1]}.{module}.lora.{match[3]}.weight"


def _maker(metadata: Mapping[str, str]) -> str | None:
    """Return the program that wrote a file, if the header says it."""
    if any(_ONE_TRAINER.match(name) for name in metadata):
        return "OneTrainer"
    try:
        software = json.loads(metadata.get("software", "{}"))
    except ValueError:
        return None
    return software.get("name") if isinstance(software, dict) and isinstance(software.get("name"), str) else None


class ComponentConfig:
    """PEFT's config of each component, as the header's metadata has it."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """Read the metadata; what is not JSON says nothing."""
        try:
            raw = json.loads(metadata.get(METADATA, "{}"))
        except ValueError:
            raw = {}
        self._fields: dict[str, Any] = raw if isinstance(raw, dict) else {}

    @property
    def base(self) -> str | None:
        """The base that the config of a component names."""
        names = (value for key, value in self._fields.items() if key.endswith(".base_model_name_or_path"))
        return next((name for name in names if isinstance(name, str) and name), None)

    def scaling(self, name: str, rank: int) -> tuple[float, str] | None:
        """Return s of a module and its rule; None without a config for its component."""
        component, _, module = name.partition(".")
        alpha = self._pattern(component, "alpha_pattern", module, self._fields.get(f"{component}.lora_alpha"))
        if alpha is None:
            return None
        root = bool(self._fields.get(f"{component}.use_rslora"))
        return alpha / (math.sqrt(rank) if root else rank), f"alpha {alpha:g} / {'√' * root}rank {rank}"

    def _pattern(self, component: str, field: str, module: str, default: object) -> float | None:
        """Return the number of the first pattern that matches a module, as in PEFT."""
        table = self._fields.get(f"{component}.{field}")
        patterns = table.items() if isinstance(table, dict) else ()
        for key, value in patterns:
            plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if (f".{module}".endswith(f".{plain}")) and isinstance(value, int | float):
                return float(value)
        return float(default) if isinstance(default, int | float) and default else None


def _scaling(
    module: str, parts: Parts, config: ComponentConfig, otherwise: ScalingOrOne, rank: int
) -> tuple[float, str]:
    """Return s of a module and its rule: of its own alpha, of the header's metadata, 1, or of ai-toolkit's caller."""
    if alpha := parts.get("alpha"):
        value = read_number(alpha)
        return (value / rank, f"alpha {value:g} / rank {rank}") if value else (1.0, "alpha 0: 1")
    of_ai_toolkit = "m" in parts and parts["m"].name.endswith(OF_AI_TOOLKIT)
    return config.scaling(module, rank) or (otherwise.of(rank) if of_ai_toolkit else (1.0, "no alpha: 1"))


def _read_module(module: str, parts: Parts, scaling: Callable[[int], tuple[float, str]], findings: Findings) -> None:
    """Turn the parts of one module into changes, or a fault."""
    if why := wrong_parts(parts, {"A", "B"}, ENDS):
        findings.fault(parts.values(), why)
        return
    if "scale" in parts:
        findings.fault(parts.values(), "has a dora_scale of kohya's form beside factors of diffusers' form")
        return
    A, B = parts["A"], parts["B"]
    if len(flat(A).shape) == 2:
        A, B = flat(A), flat(B)
    scale, rule = scaling(A.shape[0])
    if alpha := parts.get("alpha"):
        findings.ignored[alpha.name] = "read into the scaling"
    low, m, target = LowRank(A, B, scale, transposed=False), parts.get("m"), f"{module}.weight"
    if m and m.name.endswith(OF_AI_TOOLKIT):
        findings.changes += scaled_outside(target, low, m, rule)
    else:
        findings.changes.append(Change(target, Decomposed(low, m) if m else low, rule=rule))
    if bias := parts.get("b"):
        findings.changes.append(Change(f"{module}.bias", Delta(bias, scale), rule=rule))


def writer() -> Writer:
    """Return what writes the format. A merge never imports it."""
    from . import write

    return cast("Writer", write)
