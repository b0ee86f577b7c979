"""Begin and end a verb that writes an adapter: check options, open inputs, run the plan, report."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import Self

from ..adapters.new_adapter import NewAdapter
from ..errors import UnsupportedError
from ..formats.detect import WritableFormat, find_writable
from ..hub.local_paths import refuse_path
from ..hub.push import push_output
from ..hub.target import PushTarget
from ..options import FittingOptions
from ..output.folder import OutputFolder
from ..output.lineage import doubts
from ..plan.plan import Options, Plan, parse_options
from ..plan.planner import make_plan
from ..reports.fitting import FittedModule, MadeDryRun, MadeReport
from ..settings import Settings
from ..sources import Session
from ..sources.inputs import modules_of, open_inputs, unused
from ..sources.prefetch import reading
from ..storage.refs import PathLike, listed
from ..torch_import import without_collections
from .jobs import FittingPlan, Result, error_of

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
    def expected(self) -> Mapping[str, Result]:
        """Return the headers of the results, of the largest ranks: so formats are checked before anything is fitted."""

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
    format: WritableFormat
    folder: OutputFolder
    target: PushTarget | None
    """The repo on the Hub that the adapter is uploaded to, too."""

    @classmethod
    @contextmanager
    def begin(cls, out: PathLike, options: FittingOptions) -> Iterator[Self]:
        """Check everything that can be checked before an input is opened; yield the session."""
        selection, target, settings = parse_options(options), PushTarget.parse(options), Settings.parse(options)
        with Session(
            options["token"], cache=options["cache"], notify=settings.notify, follow_links=options["follow_links"]
        ) as session:
            fitting = cls(
                options=options,
                selection=selection,
                settings=settings,
                session=session,
                format=find_writable(options["format"]),
                folder=OutputFolder(out, overwrite=options["overwrite"], kind="an adapter"),
                target=target,
            )
            fitting.folder.check()
            yield fitting

    @property
    def single(self) -> bool:
        """True if whole matrices are held in single precision."""
        return self.options["compute_dtype"] != "float64"

    def match(self, base: PathLike | None, adapter: PathLike | Sequence[PathLike], verb: str) -> Plan:
        """Open a base and an adapter, or several, and match each of the adapters' tensors with the base.

        Warns about oddities; PlanError lists all tensors that match nothing.
        """
        named, options = listed(adapter), cast("dict[str, Any]", self.options)
        checkpoint, adapters = open_inputs(
            None if base is None else os.fspath(base),
            named,
            self.session,
            out=self.folder.given,
            waived=self.selection.waived,
            verb=verb,
        )
        self.folder.refuse_inside([checkpoint.source.path, *(each.source.path for each in adapters)])
        if self.target:
            refuse_path(adapters[0], self.settings.base_model or checkpoint.source.repo)
        if beside := [file.name for each in adapters for file in each.beside if file.fate == "applied"]:
            raise UnsupportedError(
                f"{verb} does not carry the weights beside {adapters[0].source.name}: {', '.join(beside)}.",
                hint=f"{' '.join(f'--ignore-file {name}' for name in beside)} leaves them out",
            )
        idle = self.selection.check_globs(modules_of(adapters))
        selection, weights = replace(self.selection, dtype=None, quantised="all"), (1.0,) * len(adapters)
        if "method" in options:
            from ..plan.methods import choose_combination

            warn = self.settings.warn
            combination, weights = choose_combination(options, len(named), len(adapters), warn)
            selection = replace(selection, combination=combination)
        for doubt in (
            *doubts(checkpoint, adapters, selection.combination.method),
            *unused(checkpoint, adapters),
            *idle,
        ):
            self.settings.warn(doubt)
        plan = make_plan(checkpoint, adapters, weights, selection)
        for doubt in plan.warnings:
            self.settings.warn(doubt)
        if checkpoint.is_here and any(edit.decomposed for item in plan.items for edit in item.edits):
            with without_collections(numpy=False):
                from ..engine.doubts import check_magnitudes
            check_magnitudes(plan)
        return plan

    def finish(self, fitter: Fitter, **details: Any) -> MadeReport | MadeDryRun:
        """Run a fitter's plan and publish the adapter, or describe the plan; `details` go into the report."""
        plan, settings = fitter.plan(), self.settings
        if self.options["max_memory"] == "auto":
            settings.max_memory = max(settings.max_memory, plan.memory)
        self._refuse(fitter)
        if self.options["dry_run"]:
            return MadeDryRun(plan=self._numbers(plan) | details, **self._facts(plan))
        with without_collections(numpy=False):
            from .run import run_plan

            fit = fitter.load()
        inputs = partial(reading, plan.bases, session=self.session)
        results, fields = run_plan(plan, self.folder, settings, inputs, fit=fit, assemble=self._named(fitter))
        details |= fitter.conclude(results)
        if pushed := push_output(self.folder.given, self.target, settings):
            details["pushed"] = asdict(pushed)
        facts = {name: result.facts for name, result in results.items()}
        return MadeReport(
            modules=tuple(
                FittedModule(
                    name=name, rank=fact["rank"], relative_error=error_of([fact]), details=fitter.describe(fact)
                )
                for name, fact in facts.items()
            ),
            relative_error=error_of(facts.values()),
            details=details,
            **fields,
            **self._facts(plan),
        )

    def _named(self, fitter: Fitter) -> Callable[[Mapping[str, Result]], dict[str, NewAdapter]]:
        """Return what makes adapters of results, with the names that the format gives a diffusion model's modules."""
        from ..naming.components import by_component

        name = self.format.NAME
        return lambda results: {where: by_component(new, name) for where, new in fitter.assemble(results).items()}

    def _refuse(self, fitter: Fitter) -> None:
        """Raise UnsupportedError for changes that the format cannot hold, before anything is fitted."""
        for new in self._named(fitter)(fitter.expected()).values():
            self.format.writer().save(new)

    def _facts(self, plan: FittingPlan) -> dict[str, Any]:
        """Return the fields that the reports of a run and of a dry run share."""
        return {
            "command": plan.command,
            "base": plan.bases[0].source.address if plan.bases else None,
            "input": plan.sources[-1].address,
            "out": self.folder.given,
            "format": plan.format.NAME,
            "warnings": tuple(self.settings.warnings),
            "seconds": round(time.monotonic() - self.settings.started, 3),
        }

    def _numbers(self, plan: FittingPlan) -> dict[str, Any]:
        """Return the modules and the sizes of a plan; UsageError for a budget that does not suffice."""
        settings = self.settings
        settings.check_memory(plan.memory)
        return {
            "modules": [job.name for job in plan.jobs],
            "bytes_out": plan.bytes_out,
            "memory": min(settings.max_memory, settings.workers * plan.memory),
            "least_memory": plan.memory,
        }
