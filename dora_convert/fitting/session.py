"""What from-lora, to-lora and extract begin and end with: options, OUT, the inputs' headers; a dry run or a real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..formats.detect import Format
from ..hub.push import push_output
from ..hub.target import PushTarget
from ..lazy_torch import without_collections
from ..output.folder import OutputFolder
from ..plan.options import Options, parse_options
from ..plan.plan import Plan
from ..plan.planner import make_plan
from ..reports.fitting import MadeDryRun, MadeReport
from ..settings import MAX_MEMORY, Settings
from ..sources.inputs import doubts
from ..storage.spool import gather
from ..sources.prefetch import reading
from ..sources.session import Session, open_session
from ..storage.checkpoint import Checkpoint
from ..storage.refs import PathLike
from .jobs import Assemble, FittingPlan, Result
from ..formats.detect import find_format
from .report import Describe, dry_run_of, report_of

Work = Callable[[], Callable[[Any, Any], Any]]
"""Imports and returns what makes a job's tensors (`craft.Made`) of a job and a lane: planning does without torch."""


@dataclass(frozen=True)
class FittingSession:
    """A verb's options, checked, and the folder that it is to write."""

    options: Options
    settings: Settings
    session: Session
    saves: Format
    folder: OutputFolder
    grows: bool = False
    """Whether the budget may grow to what the largest module needs."""
    push: PushTarget | None = None
    """Where on the Hub the adapter goes, too."""

    @classmethod
    @contextmanager
    def begin(
        cls,
        out: PathLike,
        *,
        format: str,  # noqa: A002 - the option's name
        device: str,
        dtype: str,
        compute_dtype: str,
        max_memory: str | int,
        workers: int | None,
        include: Sequence[str],
        exclude: Sequence[str],
        ignore_field: Sequence[str],
        base_model: str | None,
        cache: bool,
        token: str | None,
        push: PushTarget | None,
        overwrite: bool,
        on_progress: Callable[[int, int], None] | None,
        on_notice: Callable[[str], None] | None,
    ) -> Iterator[FittingSession]:
        """Check everything that can be checked before an input is opened; what is downloaded lasts as long."""
        options = parse_options(dtype, compute_dtype, None, "none", include, exclude, False, ignore_field)
        grows = max_memory == "auto"
        held = MAX_MEMORY if grows else max_memory
        folder = OutputFolder(Path(out), overwrite=overwrite)
        told = (device, compute_dtype, held, workers, False, base_model, on_progress, on_notice)
        settings = Settings.parse(*told, token=token, cache=cache)
        with open_session(token, cache=cache, notify=settings.notify) as session:
            making = cls(options, settings, session, find_format(format), folder, grows, push)
            making.folder.check()
            yield making

    def open(self, base: PathLike | None, adapter: PathLike, verb: str) -> tuple[Checkpoint, Adapter]:
        """The headers of a base and an adapter; what looks odd is warned of."""
        named = None if base is None else os.fspath(base)
        checkpoint, (opened,) = gather(
            named,
            [os.fspath(adapter)],
            self.folder.given,
            self.session,
            self.settings.notify,
            self.options.ignore_field,
            verb,
        )
        self.folder.refuse_inside([checkpoint.source.path, opened.source.path])
        for doubt in doubts(checkpoint, [opened]):
            self.settings.warn(doubt)
        return checkpoint, opened

    def plan(self, base: Checkpoint, adapter: Adapter) -> Plan:
        """Where everything of an adapter belongs, or one error with all that has no place."""
        return make_plan(base, [adapter], (1.0,), replace(self.options, dtype=None))

    def finish(
        self,
        order: FittingPlan,
        work: Work,
        assemble: Assemble,
        describe: Describe,
        *,
        dry_run: bool,
        conclude: Callable[[Mapping[str, Result]], Mapping[str, Any]] = lambda _: {},
        **details: Any,
    ) -> MadeReport | MadeDryRun:
        """Carry an order out, or say what it is; `details` and what is concluded are what only this verb reports."""
        if self.grows:
            self.settings.max_memory = max(self.settings.max_memory, order.memory)
        if dry_run:
            return dry_run_of(order, self.settings, self.folder.given, **details)
        with without_collections():
            from .run import craft

            make = work()
        with reading(order.bases, order.needs, self.session) as reader:
            run = craft(order, self.folder, self.settings, make, assemble, reader)
        details |= conclude(run.results)
        if pushed := push_output(self.folder.given, self.push, self.settings):
            details["pushed"] = asdict(pushed)
        return report_of(order, self.settings, self.folder.given, run, describe, **details)
