"""analyze: measure how far training moved each weight of a base, in magnitude and in direction."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..adapters import Adapter
from ..analysis.modules import PairedTensors, pair_checkpoint, pair_plan
from ..analysis.series import TunedRef, expand
from ..analysis.shares import share_by_config, share_of
from ..analysis.statistics import correlate, layer_of, name_kinds
from ..analysis.words import notes_of
from ..errors import UsageError
from ..fitting.model_weights import model_names
from ..formats.detect import detect, model_weights
from ..options import AnalyzeOptions
from ..output.lineage import doubts
from ..plan.plan import Plan, parse_options
from ..plan.planner import make_plan
from ..plan.quantised import as_dense
from ..reports.analyze import AnalyzeReport, Collision, MovedVector, Point, TunedStep
from ..reports.analyze_files import check_files, write_files
from ..settings import Settings, peak_memory
from ..sources import Session
from ..sources.inputs import modules_of, open_adapter, open_base, refuse_swapped, unused
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import refuse_changed
from ..storage.json_files import read_json
from ..storage.refs import HubRef, PathLike, listed, local_path, parse_ref, refuse_missing
from ..torch_import import without_collections
from . import takes

if TYPE_CHECKING:
    from ..analysis.run import Measured

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


@takes(AnalyzeOptions)
def analyze(base: PathLike, tuned: PathLike | Sequence[PathLike], **options: Unpack[AnalyzeOptions]) -> AnalyzeReport:
    """Measure how far training moved each matrix of `base`: ΔM and ΔD of the DoRA paper, and more.

    `tuned` holds checkpoints or adapters, the steps of one training in their order. A Trainer's folder stands for
    the folders checkpoint-N inside, sorted by step. Two adapters are also compared with each other.

    `csv`, `plot` and `report` are files to write; existing ones are replaced. If neither `base` nor `tuned` has
    weights, only the share of trained parameters is reported, from the configs.

    Raises DoraConvertError, and then writes nothing.
    """
    check_files(options)
    refuse_missing(("BASE", base), *(("TUNED", ref) for ref in listed(tuned)))
    settings, refs = Settings.parse(options), expand(listed(tuned))
    if not refs:
        raise UsageError("analyze needs BASE and one TUNED or more.")
    base = os.fspath(base)
    if shares := _shares_by_config(base, refs):
        report = _report(base, settings, options, trainable_share=shares)
        settings.warn("no weights found: only the shares of trained parameters are reported, from the configs")
        report = replace(report, warnings=tuple(settings.warnings))
        _write(report, listed(tuned), options)
        return report
    with Session(options["token"], cache=options["cache"], notify=settings.notify) as session:
        refuse_swapped(base, [each.ref for each in refs], "", "analyze")
        request = _Request(as_dense(open_base(base, "BASE", session)), options, settings, session)
        steps = [request.open(each) for each in refs]
        report = request.measure(steps)
        refuse_changed(request.base.states, *(step.opened.states for step in steps))
    _write(report, listed(tuned), options)
    return report


def _write(report: AnalyzeReport, tuned: Sequence[str], options: AnalyzeOptions) -> None:
    """Write the files that the options name."""
    if any(options[name] is not None for name in ("csv", "plot", "report")):
        from ..reports.page import command_line

        command = command_line("analyze", (report.base, *tuned), AnalyzeOptions, options)
        write_files(report, options, command)


def trainable_share(base: PathLike | Mapping[str, Any], adapter: PathLike | Mapping[str, Any]) -> float:
    """Return trained / (base + trained) parameters, as the DoRA paper counts them, from two configs alone.

    `base` is a config.json, its folder, or its content; `adapter` is the same for a PEFT adapter_config.json.

    Raises UnsupportedError for models and adapters whose shapes the configs do not tell.
    """
    return share_by_config(_config(base, CONFIG), _config(adapter, ADAPTER_CONFIG))


def _config(given: PathLike | Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the content of a config."""
    if isinstance(given, Mapping):
        return given
    path = Path(given)
    return read_json(path / name if path.is_dir() else path)


def _shares_by_config(base: str, refs: Sequence[TunedRef]) -> dict[str, float]:
    """Return the shares of adapters of which, and of whose base, only the configs are on this machine."""
    folders = [local_path(ref, "TUNED") for ref in (base, *(each.ref for each in refs))]
    names = (CONFIG, *(ADAPTER_CONFIG,) * len(refs))
    for folder, name in zip(folders, names, strict=True):
        if not (folder / name).is_file() or model_weights(folder) or any(folder.glob("adapter_model.*")):
            return {}
    return {str(path): trainable_share(folders[0], path) for path in folders[1:]}


@dataclass(frozen=True)
class _Step:
    """An opened TUNED, and its matrices beside the base's."""

    ref: TunedRef
    opened: Checkpoint | Adapter
    pairing: PairedTensors
    plan: Plan | None = None
    """The plan of a merge of the adapter."""

    @property
    def address(self) -> str:
        """The name in points."""
        return self.opened.source.address

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoint whose weights are read besides the base's."""
        return (self.opened,) if isinstance(self.opened, Checkpoint) else ()


@dataclass(frozen=True)
class _Request:
    """The base and the options of one analysis."""

    base: Checkpoint
    options: AnalyzeOptions
    settings: Settings
    session: Session

    def open(self, ref: TunedRef) -> _Step:
        """Open a TUNED, and pair its tensors with the base's."""
        selection = parse_options(self.options)
        if _is_adapter(ref.ref, self.session):
            adapter = open_adapter(ref.ref, self.session, selection.waived)
            idle = [*selection.check_globs(modules_of([adapter]))]
            plan = make_plan(self.base, [adapter], (1.0,), selection)
            self._warn([*doubts(self.base, [adapter]), *unused(self.base, [adapter]), *idle, *plan.warnings])
            step = _Step(ref, plan.adapters[0], pair_plan(plan, spectrum=self.options["spectrum"]), plan)
        else:
            tuned = as_dense(open_base(ref.ref, "TUNED", self.session))
            self._warn([*selection.check_globs({name.rpartition(".")[0] for name in model_names(tuned)})])
            pairing = pair_checkpoint(self.base, tuned, selection, spectrum=self.options["spectrum"])
            step = _Step(ref, tuned, pairing)
        self._warn(step.pairing.warnings)
        return step

    def _warn(self, texts: Sequence[str]) -> None:
        """Warn about each thing; the steps of one training have the same oddities."""
        for text in texts:
            self.settings.warn(text)

    def measure(self, steps: Sequence[_Step]) -> AnalyzeReport:
        """Measure all steps, and compare two adapters with each other."""
        with without_collections(numpy=False):
            from ..analysis.run import Measuring, measure_collision, measure_step
            from ..engine.doubts import check_magnitudes
            from ..engine.precision import scan_adapter
            from ..engine.run import choose_compute
        width = 4 if self.options["compute_dtype"] == "float32" else 8
        least = max(module.cost(width) for step in steps for module in step.pairing.modules)
        spec = choose_compute(least, self.settings)
        two = len(steps) == 2 and not any(isinstance(step.opened, Checkpoint) for step in steps)
        total = sum(module.nbytes for step in steps for module in step.pairing.modules) * (2 if two else 1)
        measuring = Measuring(self.settings, self.session, spec, total)
        points: list[Point] = []
        vectors: list[MovedVector] = []
        tuned: list[TunedStep] = []
        kinds = name_kinds(module.name for step in steps for module in step.pairing.modules)
        for step in steps:
            if isinstance(step.opened, Adapter) and step.plan:
                scan_adapter(step.opened)
                if self.base.is_here and (doubt := check_magnitudes(step.plan)):
                    self._warn([doubt])
            measured, moved = measure_step(step.pairing, (self.base, *step.checkpoints), measuring, step.address)
            points += _points(step, measured, kinds)
            vectors += moved
            tuned.append(_described(step, measured, self.base))
        collision: Sequence[Collision] = ()
        if two:
            collision = measure_collision([step.pairing for step in steps], (self.base,), measuring)
        shares = {each.checkpoint: each.trainable_share for each in tuned if each.trainable_share is not None}
        return _report(
            self.base.source.address,
            self.settings,
            self.options,
            tuned=tuple(tuned),
            points=tuple(points),
            correlation=correlate(points),
            trainable_share=shares,
            collision=tuple(collision),
            vectors=tuple(vectors),
            notes=tuple(notes_of(tuned, points, collision)),
            device=spec.title,
            compute_dtype=spec.compute_name,
        )


def _is_adapter(ref: str, session: Session) -> bool:
    """Return True if a TUNED is an adapter."""
    parsed = parse_ref(ref, "TUNED")
    if not isinstance(parsed, HubRef):
        return detect(parsed) is not None
    from ..sources.remote_headers import look

    return detect(look(parsed, "TUNED", session).source.path) is not None


def _points(step: _Step, measured: Measured, kinds: Mapping[str, str]) -> list[Point]:
    """Return the points of one step."""
    sizes = {module.name: module.before.matrix[1] * module.rows for module in step.pairing.modules}
    return [
        Point(
            checkpoint=step.address,
            step=step.ref.step,
            layer=layer_of(name),
            module=name,
            kind=kinds[name],
            elements=sizes[name],
            **{field: value for field, value in facts.items() if field != "squares"},
        )
        for name, facts in measured.facts.items()
    ]


def _described(step: _Step, measured: Measured, base: Checkpoint) -> TunedStep:
    """Return the figures of one step over all matrices."""
    size, moved, error = measured.totals
    opened = step.opened
    return TunedStep(
        checkpoint=step.address,
        title=opened.source.title,
        step=step.ref.step,
        kind=opened.kind if isinstance(opened, Adapter) else "checkpoint",
        modules=len(measured.facts),
        relative_change=(moved / size) ** 0.5 if size else None,
        lost=(error / moved) ** 0.5 if moved else None,
        trainable_share=share_of(base, opened) if isinstance(opened, Adapter) else None,
    )


def _report(base: str, settings: Settings, options: AnalyzeOptions, **fields: Any) -> AnalyzeReport:
    """Return the report; fields that are not given are empty."""
    empty: dict[str, Any] = {"tuned": (), "points": (), "correlation": {}, "collision": (), "vectors": (), "notes": ()}
    return AnalyzeReport(
        base=base,
        warnings=tuple(settings.warnings),
        top=options["top"],
        peak_memory_bytes=peak_memory(),
        seconds=round(time.monotonic() - settings.started, 3),
        **{**empty, "device": None, "compute_dtype": None, **fields},
    )
