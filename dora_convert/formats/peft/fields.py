"""Sort the fields of PEFT's `adapter_config.json`: used, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...adapters.adapter import Start
from ...errors import Fault, UnsupportedError

_USED = {
    "peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "use_dora", "modules_to_save", "init_lora_weights", "bias", "lora_bias",
    "layer_replication", "target_parameters", "trainable_token_indices", "ensure_weight_tying", "use_bdlora",
    "kasa_config", "peft_version", "task_type", "auto_mapping", "target_modules", "init_r",
}  # fmt: skip
_HARMLESS = {
    # the trained modules and the course of training: the tensors on disk already tell
    "inference_mode", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern",
    "runtime_config", "megatron_config", "megatron_core", "velora_config", "monteclora_config",
    # starting points of training, which count only if init_lora_weights names them
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # saved as the last layer had it, so shapes decide; and flags that only GPTQ layers read
    "fan_in_fan_out", "use_qalora", "qalora_group_size",
    # AdaLoRA's schedule
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so no single weight equals it",
    "arrow_config": "an Arrow router chooses among adapters per token, so no single weight equals it",
}
_PER_INPUT = {
    "XLORA", "POLY", "LILY", "SHADOW", "CARTRIDGE", "ADAPTION_PROMPT", "PROMPT_TUNING", "P_TUNING",
    "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT",
}  # fmt: skip
"""Methods that depend on the input or add to the input, so that no single weight equals them."""
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights with which training leaves the base as it is."""
_RESIDUAL = "merge it into the residual base saved at training, with --ignore-field init_lora_weights"
_LOST_STARTS = {
    "pissa_niter": f"training began with a random approximation of the base's SVD, now lost: {_RESIDUAL}",
    "corda": f"training moved the base by statistics that are not in the adapter: {_RESIDUAL}",
    "loftq": f"training began with a quantised base: {_RESIDUAL}",
    "lora_ga": f"training moved the base by gradients that are not in the adapter: {_RESIDUAL}",
}
STARTS = {"pissa": Start.PISSA, "olora": Start.OLORA}


def refuse_unsupported(raw: Mapping[str, Any], name: str, accepted: Collection[str]) -> None:
    """Refuse by name everything that this reader does not apply, except the `accepted` fields."""
    kind = raw.get("peft_type")
    if kind is None:
        raise UnsupportedError(f"The adapter {name} is not PEFT's: its config has no peft_type.")
    if not isinstance(kind, str) or kind.upper() not in ("LORA", "ADALORA"):
        reason = "no single weight equals it" if str(kind) in _PER_INPUT else "only LORA and ADALORA are merged"
        raise UnsupportedError(f"The adapter {name} is of peft_type {kind!r}: {reason}.")
    faults = [
        Fault(f"{field}={value!r}"[:60], why)
        for field, value in raw.items()
        if field not in accepted and value and value != "none" and (why := _objection(field, value))
    ]
    if faults:
        raise UnsupportedError(
            f"The adapter {name} uses what this version does not merge.",
            faults=faults,
            hint="--ignore-field NAME accepts a field that you know to change nothing",
        )


def _objection(field: str, value: Any) -> str | None:
    """Return why a field that is set stops a merge; None if it does not."""
    if field == "init_lora_weights" and isinstance(value, str):
        start = value.lower()
        if start in _PLAIN_STARTS or start in STARTS:
            return None
        known = (why for begins, why in _LOST_STARTS.items() if start.startswith(begins))
        return next(known, "a start of training that this version does not know")
    if field in _USED | _HARMLESS:
        return None
    return _REFUSED.get(field, "a field this version does not know")
