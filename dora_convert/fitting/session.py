"""Begin and end a verb that writes an adapter: check options, open inputs, run the plan, report."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from ..adapters.new_adapter import NewAdapter
from ..formats.detect import Format, find_format
from ..hub.push import push_output
from ..hub.target import PushTarget
from ..lazy_imports import without_collections
from ..options import FittingOptions
from ..output.folder import OutputFolder
from ..plan.options import Options, parse_options
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..reports.fitting import MadeDryRun, MadeReport
from ..settings import MAX_MEMORY, Settings
from ..sources.inputs import doubts, open_inputs
from ..sources.prefetch import reading
from ..sources.session import Session
from ..storage.refs import PathLike
from .jobs import FittingPlan, Result
from .report import dry_run_of, report_of

if TYPE_CHECKING:  # which imports torch
    from .run import FitJob


class Fitter(ABC):
    """One verb's way to an adapter: its plan, its arithmetic, its result, and its report."""

    @abstractmethod
    def plan(self) -> FittingPlan:
        """Return the modules to fit, and how large the result will be."""

    @abstractmethod
    def load(self) -> FitJob:
        """Import and return the arithmetic of one job; the plan is made without torch."""

    @abstractmethod
    def assemble(self, results: Mapping[str, Result]) -> Mapping[str, NewAdapter]:
        """Return the adapters made of the results, by their sub-folders of OUT; "" is OUT itself."""

    def describe(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the numbers of a module that only this verb reports."""
        return {}

    def conclude(self, results: Mapping[str, Result]) -> Mapping[str, Any]:  # noqa: ARG002
        """Return the numbers over all modules that only this verb reports, and warn about poor ones."""
        return {}


@dataclass(frozen=True, kw_only=True)
class FittingSession:
    """A verb's options, checked, and the folder that the verb writes."""

    options: FittingOptions
    selection: Options
    """The options that decide the plan."""
    settings: Settings
    session: Session
    format: Format
    folder: OutputFolder
    target: PushTarget | None
    """The repo on the Hub that the adapter is uploaded to, too."""

    @classmethod
    @contextmanager
    def begin(cls, out: PathLike, options: FittingOptions, ignore_field: Sequence[str] = ()) -> Iterator[Self]:
        """Check everything that can be checked before an input is opened; yield the session."""
        compute, budget = options["compute_dtype"], options["max_memory"]
        selection = parse_options(
            dtype=options["dtype"],
            compute_dtype=compute,
            include=options["include"],
            exclude=options["exclude"],
            ignore_field=ignore_field,
        )
        target = PushTarget.parse(options)
        settings = Settings.parse(
            options,
            MAX_MEMORY if budget == "auto" else budget,
            compute_dtype=compute,
            verify=False,
            base_model=options["base_model"],
        )
        with Session(
            options["token"], cache=options["cache"], notify=settings.notify, follow_links=options["follow_links"]
        ) as session:
            fitting = cls(
                options=options,
                selection=selection,
                settings=settings,
                session=session,
                format=find_format(options["format"]),
                folder=OutputFolder(Path(out), overwrite=options["overwrite"]),
                target=target,
            )
            fitting.folder.check()
            yield fitting

    @property
    def single(self) -> bool:
        """True if whole matrices are held in single precision."""
        return self.options["compute_dtype"] != "float64"

    @property
    def base_model(self) -> str | None:
        """The base's repo id, as the caller gave it."""
        return self.options["base_model"]

    def match(self, base: PathLike | None, adapter: PathLike, verb: str) -> Plan:
        """Open a base and an adapter, and match each of the adapter's tensors with the base.

        Warns about oddities; PlanError lists all tensors that match nothing.
        """
        checkpoint, adapters = open_inputs(
            None if base is None else os.fspath(base),
            [os.fspath(adapter)],
            self.session,
            out=self.folder.given,
            accepted=self.selection.ignore_field,
            verb=verb,
        )
        self.folder.refuse_inside([checkpoint.source.path, adapters[0].source.path])
        for doubt in doubts(checkpoint, adapters):
            self.settings.warn(doubt)
        return make_plan(checkpoint, adapters, (1.0,), replace(self.selection, dtype=None))

    def finish(self, fitter: Fitter, **details: Any) -> MadeReport | MadeDryRun:
        """Run a fitter's plan and publish the adapter, or describe the plan; `details` go into the report."""
        plan, settings, out = fitter.plan(), self.settings, self.folder.given
        if self.options["max_memory"] == "auto":
            settings.max_memory = max(settings.max_memory, plan.memory)
        if self.options["dry_run"]:
            return dry_run_of(plan, settings, out, **details)
        with without_collections():
            from .run import run_plan

            fit = fitter.load()
        with reading(plan.bases, plan.needs, self.session) as reader:
            run = run_plan(plan, self.folder, settings, reader, fit=fit, assemble=fitter.assemble)
        details |= fitter.conclude(run.results)
        if pushed := push_output(out, self.target, settings):
            details["pushed"] = asdict(pushed)
        return report_of(plan, settings, out, run, fitter.describe, **details)
