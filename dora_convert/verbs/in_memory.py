"""iter_merged and merge_state_dict: the tensors of a merge, handed over instead of written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import Unpack

from ..errors import UsageError
from ..options import (
    CallOptions,
    CombineOptions,
    Device,
    Dtype,
    FieldOptions,
    MatchOptions,
    MergeOptions,
    SelectOptions,
    TokenOptions,
)
from ..plan.plan import Plan, parse_options
from ..settings import Settings
from ..sources import Session
from ..sources.inputs import open_adapter
from ..storage.refs import PathLike, listed
from ..torch_import import without_collections
from . import takes
from .merge import MergeRequest, make_request_plan, plan_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from ..engine.precision import ComputeSpec


class StreamOptions(CombineOptions, MatchOptions, FieldOptions, SelectOptions, TokenOptions, CallOptions, total=False):
    """The options of iter_merged and merge_state_dict."""

    dtype: Dtype
    device: Device
    compute_dtype: Dtype
    max_memory: str | int | None
    workers: int | None


@takes(StreamOptions)
def iter_merged(
    base: PathLike | None, adapters: PathLike | Sequence[PathLike], **options: Unpack[StreamOptions]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the merged checkpoint, one after another, with the bits that `merge` would write.

    Names and order are those of the output's files. Tensors are on the CPU, in memory of their own. No more of
    the model than `max_memory`, or one tensor, is held. The inputs are checked before the function returns; the
    self-check of `merge`, which reads what was written, is not done. A base on the Hub is downloaded first.

    Raises DoraConvertError; NaN, Inf and overflow are raised when their tensor is reached.
    """
    settings = Settings.parse(options)
    with Session(options["token"], notify=settings.notify) as session:
        plan = make_request_plan(_request(base, adapters, options, settings, session), "OUT", "whole")
    return _tensors(plan, settings)


def _request(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    options: StreamOptions,
    settings: Settings,
    session: Session,
) -> MergeRequest:
    """Return the request of a merge without an output."""
    return MergeRequest(
        base=base,
        adapters=listed(adapters),
        out=None,
        options=cast("MergeOptions", options),
        selection=parse_options(options),
        settings=settings,
        session=session,
        target=None,
    )


def _tensors(plan: Plan, settings: Settings) -> Iterator[tuple[str, Tensor]]:
    """Check what headers do not show, and return the generator of the tensors."""
    plan, spec = _prepared(plan, settings)
    from ..engine.in_memory import merged_tensors

    return ((item.name, tensor) for item, tensor in merged_tensors(plan, settings, spec))


def _prepared(plan: Plan, settings: Settings) -> tuple[Plan, ComputeSpec]:
    """Choose the device, cut the plan for it, and refuse or warn of doubtful values in the adapters."""
    with without_collections():
        from .merge.pipeline import check_adapters

    plan, spec, _ = check_adapters(plan, settings)
    return plan, spec


@takes(StreamOptions)
def merge_state_dict(
    state_dict: Mapping[str, Tensor] | Module, adapters: PathLike | Sequence[PathLike], **options: Unpack[StreamOptions]
) -> dict[str, Tensor]:
    """Return a state dict with adapters merged, with the bits that `merge` would write for such a base.

    `state_dict` is a mapping of names to tensors of any device, or a model, whose state dict is taken and whose
    config names its tied weights. The input is not changed: tensors that no adapter changes are the same objects
    in the result, and merged ones are new tensors on the device of the old. Load the result with
    `model.load_state_dict`. The norms of a DoRA are not compared with the base, as `merge` does for a warning.

    Raises DoraConvertError.
    """
    settings = Settings.parse(options)
    with without_collections():
        from ..engine.in_memory import in_memory, merged_tensors
    tensors, config = _state_of(state_dict)
    with Session(options["token"], notify=settings.notify) as session:
        request = _request(None, adapters, options, settings, session)
        opened = [open_adapter(ref, session, request.selection.waived) for ref in request.adapters]
        base, reader = in_memory(tensors, config, type(state_dict).__name__)
        plan = plan_inputs(request, base, opened)
    plan, spec = _prepared(plan, settings)
    merged = merged_tensors(plan, settings, spec, reader)
    return {item.name: _result(item.name, tensor, tensors, verbatim=item.verbatim) for item, tensor in merged}


def _state_of(state: Mapping[str, Tensor] | Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any] | None]:
    """Return the tensors of a state dict or of a model, and the model's config."""
    from torch import Tensor

    if not (isinstance(state, Mapping) or hasattr(state, "state_dict")):
        raise UsageError(
            "state_dict is neither a mapping of names to tensors nor a model.", hint="iter_merged reads a BASE"
        )
    config = getattr(state, "config", None)
    values = state if isinstance(state, Mapping) else state.state_dict()
    if odd := [name for name, tensor in values.items() if not isinstance(tensor, Tensor)]:
        raise UsageError(f"The state dict holds {odd[0]!r}, which is not a tensor.")
    if wrapped := [name for name in values if ".lora_" in name]:
        raise UsageError(
            f"The model holds an adapter already: {wrapped[0]}.", hint="name the model without it: model.unload()"
        )
    if config is None or not hasattr(config, "to_dict"):
        return values, None
    return values, json.loads(json.dumps(config.to_dict(), default=str))  # as config.json would hold it


def _result(name: str, tensor: Tensor, tensors: Mapping[str, Tensor], *, verbatim: bool) -> Tensor:
    """Return the caller's own tensor if nothing changes it, else the merged one on the same device."""
    if name not in tensors:
        return tensor
    return tensors[name] if verbatim else tensor.to(tensors[name].device)
