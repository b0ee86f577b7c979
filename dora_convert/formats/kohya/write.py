"""Write kohya's files, with LyCORIS' `dora_scale` by rows: never by columns, which LyCORIS itself cannot load.

Modules of a pipeline get the prefix of their component, those of any other model `lycoris_`.
"""

from __future__ import annotations

from ...adapters import Adapter, Change
from ...adapters.new_adapter import Files, NewAdapter, ShapedTensor
from ...adapters.writing import factors_of, matrices, number, shaped

PREFIXES = {
    "unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2",
    "text_encoder_3": "lora_te3",
}  # fmt: skip
WEIGHTS = "adapter.safetensors"


def save(new: NewAdapter) -> Files:
    """Return the file; UnsupportedError for changes that are neither LoRA nor DoRA by rows."""
    found = factors_of(new, "kohya")
    components = {each.module.partition("/")[0] for each in found if "/" in each.module}
    tensors: dict[str, ShapedTensor] = {}
    for each in found:
        A, B = matrices(each.low)
        name = flat_name(each.module, components)
        tensors[f"{name}.lora_down.weight"] = shaped(A, (*A.shape, *each.kernel))
        zero = not each.low.scale  # an alpha of 0 stands for a scaling of 1
        tensors[f"{name}.lora_up.weight"] = shaped(B, (*B.shape, *each.kernel), 0.0 if zero else 1.0)
        tensors[f"{name}.alpha"] = number((each.low.scale or 1) * each.low.rank)
        if each.m:
            ones = (1,) * (len(A.shape) - 1 + len(each.kernel))
            tensors[f"{name}.dora_scale"] = shaped(each.m, (each.m.numel, *ones))
    is_dora = any(each.m for each in found)
    args = '{"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}' if is_dora else '{"algo": "lora"}'
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": args}
    return Files(WEIGHTS, dict(sorted(tensors.items())), {}, metadata=metadata)


def flat_name(module: str, components: set[str]) -> str:
    """Return the flattened name of a module, with the prefix of its component."""
    component, inside, name = module.rpartition("/")
    prefix = PREFIXES.get(component, f"lora_{component}") if inside else "lycoris"
    if component == "text_encoder" and "text_encoder_2" in components:
        prefix = "lora_te1"
    return f"{prefix}_{name.replace('.', '_')}"


def objection(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why LyCORIS cannot load a LoRA as a DoRA; None if it can."""
    return None


def shares_rank(change: Change, tensor: str, like: Adapter) -> str | None:  # noqa: ARG001 - as all writers
    """Return why a weight's factors must keep their rank; None if they need not."""
    return None
