"""convert: write an adapter in another tool's format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..adapters import Adapter, Change, Full, low_rank, tensors_of
from ..adapters.beside import doubts_of
from ..adapters.new_adapter import Files, NewAdapter
from ..errors import PlanError, UsageError
from ..fitting.jobs import FittingPlan, Result
from ..fitting.session import Fitter, FittingSession
from ..formats.detect import writable
from ..options import ConvertOptions
from ..plan.planner import make_plan
from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..sources.inputs import open_adapter, open_base, refuse_needless
from ..storage.checkpoint import Checkpoint
from ..storage.reader import same_bytes
from ..storage.refs import PathLike, refuse_missing
from . import takes

if TYPE_CHECKING:
    from ..fitting.run import FitJob

DEFAULT = "peft"
"""The value of --format that is not given."""
ROUNDING = 2.0**-24
"""The largest relative error of a scaling that is folded into B and rounded to float32."""


@takes(ConvertOptions)
def convert(adapter: PathLike, out: PathLike, **options: Unpack[ConvertOptions]) -> MadeReport | MadeDryRun:
    """Write an adapter in the format `to`: the same change of the same weights.

    `base` is needed where the names or the order of rows depend on the model: for files of kohya's names, for
    pipelines, and for torchtune and GGUF. If a format has one alpha or one rank, scalings are folded into B, and ranks
    padded with zeros. What the format cannot hold is refused by name.

    Raises DoraConvertError, and then leaves nothing under `out`.
    """
    options["format"] = _target(options)
    with FittingSession.begin(out, options) as session:
        ref = os.fspath(adapter)
        refuse_missing(("ADAPTER", ref), ("BASE", options["base"]))
        opened = open_adapter(ref, session.session, session.selection.waived)
        refuse_needless([opened], session.selection.waived)
        base = None if options["base"] is None else open_base(os.fspath(options["base"]), "BASE", session.session)
        session.folder.refuse_inside([opened.source.path, *([base.source.path] if base else [])])
        fitter = _Conversion(session, _settled(opened, base, session), base)
        report = session.finish(fitter, **{"from": opened.format, "to": session.format.NAME})
        if isinstance(report, MadeReport):
            return replace(report, modules=fitter.modules, relative_error=ROUNDING if fitter.folded else 0.0)
        return replace(report, plan={**report.plan, "modules": [module.name for module in fitter.modules]})


def _target(options: ConvertOptions) -> str:
    """Return the format to write; UsageError if none is named, or two are."""
    to, other = options["to"], options["format"]
    if to and other not in (to, DEFAULT):
        raise UsageError(f"--to {to} and --format {other} name two formats.", hint="leave out --format")
    if not to and other == DEFAULT:
        raise UsageError(f"convert needs --to FORMAT: one of {', '.join(writable())}.", hint="such as --to peft")
    return to or other


def _settled(adapter: Adapter, base: Checkpoint | None, session: FittingSession) -> Adapter:
    """Return an adapter with the base's names, and with nothing left open; UsageError if that needs a base."""
    if adapter.faults:
        raise PlanError(f"The adapter {adapter.source.name} contradicts itself.", faults=adapter.faults)
    for doubt in (*(() if base else adapter.warnings), *doubts_of(adapter.beside, adapter.source.name)):
        session.settings.warn(doubt)
    if base:
        plan = make_plan(base, [adapter], (1.0,), replace(session.selection, quantised="all"))
        for doubt in plan.warnings:
            session.settings.warn(doubt)
        settled = plan.adapters[0]
        changes = (change for change in settled.changes if not _is_copy(change, base))
        return replace(settled, changes=tuple(changes))
    if adapter.naming == "flattened" or adapter.fit or any(hasattr(c.update, "choices") for c in adapter.changes):
        raise UsageError(
            f"{adapter.source.name} can be read only with its base, which decides names or the order of rows.",
            hint="--base BASE",
        )
    return adapter


def _is_copy(change: Change, base: Checkpoint) -> bool:
    """Return True for a tensor of the base that the adapter's file holds, too, and that training left as it was."""
    update, tensor = change.update, base.tensors.get(change.target)
    return isinstance(update, Full) and update.copied and tensor is not None and same_bytes(tensor, update.value)


@dataclass
class _Conversion(Fitter):
    """Writes an adapter's changes, as they are, in another format."""

    session: FittingSession
    adapter: Adapter
    base: Checkpoint | None

    @property
    def folded(self) -> bool:
        """True if scalings go into B."""
        return self.files.folded

    @cached_property
    def files(self) -> Files:
        """The files to write; UnsupportedError names what the format cannot hold."""
        return self.session.format.writer().save(self.new)

    @cached_property
    def new(self) -> NewAdapter:
        """The adapter's changes, for the writer."""
        from ..naming.components import by_component

        same = self.adapter.format == self.session.format.NAME
        new = NewAdapter(
            self.adapter.changes,
            self.adapter if same else None,
            self.session.settings.base_model or self.adapter.base,
            revision=self.adapter.revision,
            task=self.adapter.task,
            model=self.base,
            targets=None if same else (),
        )
        return by_component(new, self.session.format.NAME)

    @property
    def modules(self) -> tuple[FittedModule, ...]:
        """Every module that has factors."""
        error = ROUNDING if self.folded else 0.0
        return tuple(
            FittedModule(name=change.target, rank=low.rank, relative_error=error, details={})
            for change in self.adapter.changes
            if (low := low_rank(change.update))
        )

    def plan(self) -> FittingPlan:
        """Return a plan without jobs: nothing is fitted. UnsupportedError names what the format cannot hold."""
        size = sum(tensor.nbytes for change in self.adapter.changes for tensor in tensors_of(change.update))
        words = (self.adapter.source.title, "OUT", "--to", self.session.format.NAME)
        return FittingPlan(
            command="convert",
            words=(*words, *(["--base", self.base.source.title] if self.base else [])),
            bases=(self.base,) if self.base else (),
            jobs=[],
            format=self.session.format,
            bytes_out=4 * size,
            terms={"to": self.session.format.NAME, "folded": self.folded},
            is_dora="DoRA" in self.adapter.kind,
            like=self.adapter,
            dtype=self.session.selection.dtype,
        )

    def load(self) -> FitJob:
        """Return no arithmetic: there are no jobs."""

        def nothing(*_: Any) -> Any:
            raise AssertionError("a conversion has no jobs")

        return nothing

    def expected(self) -> dict[str, Result]:
        """Return no headers: nothing is fitted."""
        return {}

    def assemble(self, results: Mapping[str, Result]) -> dict[str, NewAdapter]:  # noqa: ARG002 - none
        """Return the adapter's changes."""
        return {"": self.new}

    def conclude(self, results: Mapping[str, Result]) -> Mapping[str, Any]:  # noqa: ARG002 - none
        """Return True for scalings that went into B."""
        return {"folded": self.folded}
