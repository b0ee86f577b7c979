"""from-lora: a DoRA of a LoRA, with the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..adapters.adapter import Adapter, Change
from ..adapters.new_adapter import NewAdapter
from ..adapters.updates import Decomposed, LowRank, tensors_of
from ..errors import Fault, UnsupportedError, UsageError
from ..fitting.jobs import FittingPlan, MatchedChange, Result, modules_besides, place_changes
from ..fitting.report import share
from ..fitting.session import FittingSession
from ..formats.detect import Format
from ..hub.target import PushTarget
from ..naming.ties import is_embedding, is_head
from ..plan.plan import Plan
from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..settings import chosen
from ..storage.refs import PathLike

TIED = "serves as embedding and as head, whose norms run along different axes"
REST = "lora"
"""The sub-folder of OUT for what stays a LoRA."""


def from_lora(
    base: PathLike | None,
    lora: PathLike,
    out: PathLike,
    *,
    init: str = "preserve",
    split: bool = False,
    format: str = "peft",  # noqa: A002 - the option's name
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ignore_field: Sequence[str] = (),
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MadeReport | MadeDryRun:
    """Make a DoRA of a LoRA: the same factors, and m = ‖W + sBA‖, so that outputs stay as they are.

    `base` and `lora` are folders or Hub repos; a base of None is the one that the adapter names. With `init`
    "pretrained", m = ‖W‖, the start of DoRA's paper. With `split`, modules that cannot be DoRA stay LoRA, in an adapter
    of their own in `out`/lora; otherwise they are an error that names them all.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    preserve = chosen(init, {"preserve": True, "pretrained": False}, "--init")
    with FittingSession.begin(
        out, format=format, device=device, dtype=dtype, compute_dtype=compute_dtype, max_memory=max_memory, workers=workers,
        include=include, exclude=exclude, ignore_field=ignore_field, base_model=base_model, cache=cache, token=token, overwrite=overwrite,
        push=PushTarget.parse(push_to_hub=push_to_hub, private=private, create_pr=create_pr, commit_message=commit_message, token=token), on_progress=on_progress, on_notice=on_notice,
    ) as making:  # fmt: skip
        plan = making.plan(*making.open(base, lora, "from-lora"))
        _refuse_dora(plan.adapters[0])
        sorted_ = _sorted(plan, making.saves, split=split)
        order = _order(plan, making, sorted_, init=init, split=split)
        return making.finish(
            order, partial(_work, preserve=preserve), partial(_assemble, sorted_, plan, base_model), _module,
            dry_run=dry_run, init=init, left_as_lora=[change.target for change in sorted_.rest],
        )  # fmt: skip


def _work(*, preserve: bool) -> Callable[[MatchedChange, Any], Any]:
    from ..fitting.magnitudes import magnitudes

    return partial(magnitudes, preserve=preserve)


def _refuse_dora(adapter: Adapter) -> None:
    if any(isinstance(change.update, Decomposed) for change in adapter.changes):
        raise UsageError(
            f"The adapter {adapter.source.name} is a DoRA already.", hint="to-lora goes the other way"
        )


class _Sorted(NamedTuple):
    """The changes of a LoRA: what becomes DoRA, what cannot, and what has no factors."""

    made: list[MatchedChange]
    left: list[MatchedChange]
    unplaced: list[Change]
    others: list[Change]

    @property
    def rest(self) -> list[Change]:
        """What stays a LoRA."""
        return [job.change for job in self.left] + self.unplaced


def _sorted(plan: Plan, saves: Format, *, split: bool) -> _Sorted:
    """Sort them; UnsupportedError names all that cannot be DoRA, unless they may be left."""
    adapter, width = plan.adapters[0], plan.options.width
    placed, unplaced, others = place_changes(plan, lambda item, _: item.cost(width))
    faults = {change.target: TIED for change in unplaced}
    for job in placed:
        tied = unplaced and (is_embedding(job.name) or is_head(job.name))
        if why := TIED if tied else saves.objection(job.change, job.item.name, adapter):
            faults[job.name] = why
    made = [job for job in placed if job.name not in faults]
    if not made or (faults and not split):
        raise UnsupportedError(
            f"{len(faults)} modules of {adapter.source.name} cannot be DoRA.",
            faults=[Fault(name, why) for name, why in faults.items()],
            hint=f"--split leaves them LoRA, in an adapter of their own in OUT/{REST}" if made else None,
        )
    return _Sorted(made, [job for job in placed if job.name in faults], unplaced, others)


def _order(plan: Plan, making: FittingSession, found: _Sorted, *, init: str, split: bool) -> FittingPlan:
    """What is to be done, and how large it will be."""
    changes = [*(job.change for job in found.made), *found.rest, *found.others]
    carried = sum(tensor.nbytes for change in changes for tensor in tensors_of(change.update))
    adapter = plan.adapters[0]
    options = [*(["--init", init] if init != "preserve" else []), *(["--split"] if split else [])]
    return FittingPlan(
        command="from-lora",
        words=(plan.base.source.title, adapter.source.title, "OUT", *options),
        bases=(plan.base,),
        jobs=found.made,
        format=making.saves,
        bytes_out=carried + sum(4 * job.edit.low.outputs for job in found.made if job.edit.low),
        terms={"plan": plan.fingerprint, "init": init, "split": split},
        makes_dora=True,
        like=adapter,
        dtype=making.options.dtype,
    )


def _assemble(
    found: _Sorted, plan: Plan, base_model: str | None, results: Mapping[str, Result]
) -> dict[str, NewAdapter]:
    """The DoRA; and what stays a LoRA, in a sub-folder."""
    adapter = plan.adapters[0]
    changes = [
        replace(job.change, update=Decomposed(low, results[job.name].tensors["m"]))
        for job in found.made
        if isinstance(low := job.change.update, LowRank)
    ]
    before = sum(isinstance(change.update, LowRank) for change in adapter.changes)
    targets = None if len(changes) == before else ()
    besides = modules_besides(plan, found.made)
    whole = NewAdapter((*changes, *found.others), adapter, base_model, targets=targets, besides=besides)
    if not found.rest:
        return {"": whole}
    rest = replace(whole, changes=tuple(found.rest), besides=modules_besides(plan, found.left))
    return {"": whole, f"{REST}/": rest}


def _module(name: str, result: Result) -> FittedModule:
    facts = result.facts
    error = share(facts["lost"], facts["change"])
    return FittedModule(name=name, rank=facts["rank"], relative_error=error, details={})
