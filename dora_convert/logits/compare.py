"""Run base and adapters, then a merged checkpoint, on the same prompts, and judge their difference.

The reference is PEFT's own forward, unmerged. Only one model is in memory at a time: the reference's outputs
are kept on disk. The effect of rounding on the outputs is measured, too, on the reference itself.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from ..adapters.adapter import LowRank
from ..engine.precision import TORCH, choose, full_precision
from ..errors import UnsupportedError, UsageError
from ..plan.plan import Plan
from ..reports.verify import OutputsReport
from ..settings import Settings
from ..sizes import format_size, peak_memory
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import PICKLES
from .difference import Difference
from .forward import WEIGHTS_LEVEL, Batch, OutputFiles, continues_alike
from .memory import MemoryChoice, choose_memory, estimate, skeleton
from .models import ModelLoader, ModelSpec, quiet, specify, view
from .rounding_floor import perturb
from .samples import Samples, make_samples, vocabulary

DRAWS = 3
"""Times that the reference is perturbed by half a unit."""
MEAN_MARGIN, FEW_MARGIN, LARGEST_MARGIN = 2.0, 6.0, 8.0
"""Largest allowed differences, in multiples of the rounding floor: mean, mean over few classes, and maximum.

docs/verify.md has the differences that correct merges leave.
"""
FEW = 100
"""Classes up to which the mean says little: all may change together."""
ARITHMETIC = 2.0**-17
"""Share of the largest output that float32 arithmetic in another order may change, for any stored dtype."""


@contextmanager
def prepared(plan: Plan, settings: Settings, texts: Sequence[str], limit: int | None) -> Iterator[Comparison]:
    """Check everything that can be checked before a model is loaded; `limit` is in bytes of memory.

    Raises UnsupportedError for models that cannot be compared this way, UsageError if the memory is too
    small.
    """
    refuse(plan)
    device = choose(settings.device, "float32").device
    with TemporaryDirectory(prefix="dora-convert-") as name:
        scratch = Path(name)
        with quiet():
            base = view(plan.base, scratch / "base")
            spec = specify(base, plan.output_config)
            folders = [*(adapter.source.path for adapter in plan.adapters), base]
            samples = make_samples(texts, folders, spec.name, spec.config)
            memory = _choose_memory(plan, spec, samples, limit, device)
        for note in samples.notes:
            settings.notify(note)
        how = "block by block from its files" if memory.offload else "whole"
        settings.notify(
            f"outputs: {spec.name} on {device}, one model at a time, {how}; "
            f"about {format_size(memory.nbytes)} of memory ({memory.why})"
        )
        loader = ModelLoader(device, memory.offload, scratch)
        yield Comparison(
            plan=plan, settings=settings, spec=spec, samples=samples, memory=memory, loader=loader, base=base
        )


def refuse(plan: Plan) -> None:
    """Raise UnsupportedError if the adapters were not trained as one model, or cannot be loaded as one."""
    if files := [file.name for adapter in plan.adapters for file in adapter.beside if file.fate == "applied"]:
        raise UnsupportedError(
            f"PEFT runs an adapter without the weights beside it: {', '.join(files)}.", hint=WEIGHTS_LEVEL
        )
    if any(adapter.format != "peft" for adapter in plan.adapters):
        raise UnsupportedError(
            "The outputs level runs adapters through PEFT, and one is not PEFT's.", hint=WEIGHTS_LEVEL
        )
    if plan.options.include or plan.options.exclude:
        raise UnsupportedError("The outputs level compares with whole adapters, not with parts.", hint=WEIGHTS_LEVEL)
    if any(weight != 1 for weight in plan.weights):
        raise UnsupportedError("No model was trained at another --weight than 1.", hint=WEIGHTS_LEVEL)
    plain = all(
        adapter.kind == "LoRA" and all(isinstance(change.update, LowRank) for change in adapter.changes)
        for adapter in plan.adapters
    )
    if len(plan.adapters) > 1 and not plain:
        raise UnsupportedError(
            "Several adapters were not trained together: only a sum of plain LoRAs can be compared.", hint=WEIGHTS_LEVEL
        )


def _choose_memory(
    plan: Plan, spec: ModelSpec, samples: Samples, limit: int | None, device: torch.device
) -> MemoryChoice:
    bare = skeleton(spec.model_class, spec.config)
    need = estimate(bare, spec.config, plan, samples.tokens, samples.longest)
    memory = choose_memory(need, limit, device)
    if memory.offload:
        _refuse_offload(plan.base)
        if any(item.start for item in plan.items):
            raise UsageError(
                "An adapter whose training changed the base (PiSSA and the like) is only compared whole.",
                hint=f"--max-memory {-(-need.whole // 2**20)}MiB",
            )
    return memory


def _refuse_offload(checkpoint: Checkpoint) -> None:
    if any(shard.filename.endswith(PICKLES) for shard in checkpoint.shards):
        raise UnsupportedError(
            f"{checkpoint.source.name} is too large for memory; only safetensors are read block by block.",
            hint=WEIGHTS_LEVEL,
        )


@dataclass
class Comparison:
    """A reference that can be run, its prompts and its memory; nothing is loaded yet."""

    plan: Plan
    settings: Settings
    spec: ModelSpec
    samples: Samples
    memory: MemoryChoice
    loader: ModelLoader
    base: Path
    draw: int = 0
    """Times that the reference has been perturbed."""
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    """Dtypes of the merged checkpoint's tensors by name."""

    def against(self, merged: Checkpoint) -> OutputsReport:
        """Run both models and compare their outputs.

        Raises UnsupportedError if a model cannot be run, or if the reference's outputs hold NaN.
        """
        if self.memory.offload:
            _refuse_offload(merged)
        started = time.monotonic()
        self.stored = {t.name: TORCH[t.dtype] for t in merged.tensors.values() if t.dtype in TORCH}
        kept = OutputFiles(self.loader.scratch / "kept")
        with quiet(), full_precision():
            folder = view(merged, self.loader.scratch / "merged")
            spec = specify(folder, merged.config)
            batches, floor = self._reference(kept)
            gc.collect()
            difference, alike, problems = self._compare(spec, folder, batches, kept)
        problems += _judge(difference, floor)
        return self._report(merged, difference, floor, alike, problems, started=started)

    def _reference(self, kept: OutputFiles) -> tuple[list[Batch], Difference]:
        """Keep the outputs of base and adapters, and measure their change under perturbed weights."""
        trained, size = self._vocabularies()
        runner = self.loader.reference(
            self.spec,
            self.base,
            self.plan.adapters,
            vocabulary=trained if trained != size else None,
            on_load=self._perturb_loaded,
        )
        batches = [runner.extend(prompt) for prompt in self.samples.batches]
        for number, batch in enumerate(batches):
            outputs = runner.outputs(batch)
            if outputs.isnan().any():
                raise UnsupportedError(
                    "The outputs of base and adapter are not numbers.", hint="do they belong together?"
                )
            kept[f"{number}"] = kept[f"{number}.moved"] = outputs
        floor = Difference()
        for self.draw in range(1, DRAWS + 1):
            if not self.memory.offload:
                self._perturb("", runner.model.get_base_model(), self.draw)
            for number, batch in enumerate(batches):
                outputs = runner.outputs(batch)
                floor.add(kept[f"{number}.moved"], outputs)
                kept[f"{number}.moved"] = outputs
        return batches, floor

    def _vocabularies(self) -> tuple[int, int]:
        """Return the sizes of the trained model's and of the base's vocabulary."""
        size = vocabulary(self.spec.config)
        config = self.plan.output_config or {}
        inner = config.get("text_config") or {}
        return config.get("vocab_size") or inner.get("vocab_size") or size, size

    def _perturb_loaded(self, name: str, block: nn.Module) -> None:
        """Perturb a block that was read from its files as often as the reference has been perturbed."""
        for draw in range(1, self.draw + 1):
            self._perturb(name, block, draw)

    def _perturb(self, prefix: str, module: nn.Module, draw: int) -> None:
        usual, _ = Counter(self.stored.values()).most_common(1)[0]
        perturb(module, prefix, self.stored, usual, draw)

    def _compare(
        self, spec: ModelSpec, folder: Path, batches: Sequence[Batch], kept: OutputFiles
    ) -> tuple[Difference, int | None, list[str]]:
        """Return the merged checkpoint's difference, its prompts continued alike, and its problems."""
        difference = Difference()
        if spec.name != self.spec.name:
            return difference, None, [f"config.json names {spec.name}; it should be {self.spec.name}"]
        runner, missing = self.loader.checkpoint(spec, folder)
        problems = [f"{name} is missing from MERGED" for name in sorted(missing)]
        alike = 0
        for number, batch in enumerate(batches):
            outputs, reference = runner.outputs(batch), kept[f"{number}"]
            if outputs.shape != reference.shape:
                shapes = f"{list(outputs.shape)}; it should be {list(reference.shape)}"
                return difference, None, [*problems, f"an output's shape is {shapes}"]
            difference.add(reference, outputs)
            alike += continues_alike(batch, outputs) if runner.generates else 0
        return difference, alike if runner.generates else None, problems

    def _report(
        self,
        merged: Checkpoint,
        difference: Difference,
        floor: Difference,
        alike: int | None,
        problems: list[str],
        *,
        started: float,
    ) -> OutputsReport:
        largest, mean = _floors(floor)
        count = max(1, difference.positions)
        return OutputsReport(
            base=self.plan.base.source.address,
            adapters=tuple(adapter.source.address for adapter in self.plan.adapters),
            merged=merged.source.address,
            verdict="differ" if problems else "agree",
            architecture=self.spec.name,
            prompts=self.samples.count,
            positions=difference.positions,
            max_abs_logit_error=difference.largest,
            mean_abs_logit_error=difference.mean,
            rounding_floor=largest,
            mean_rounding_floor=mean,
            mean_margin=_mean_margin(difference),
            max_margin=LARGEST_MARGIN,
            mean_kl=difference.divergence / count,
            top1_agreement=difference.agreeing / count,
            greedy_agreement=None if alike is None else alike / self.samples.count,
            device=str(self.loader.device),
            offloaded=self.memory.offload,
            memory_bytes=self.memory.nbytes,
            peak_memory_bytes=peak_memory(),
            problems=tuple(problems),
            notes=self.samples.notes,
            warnings=tuple(self.settings.warnings),
            seconds=round(time.monotonic() - started, 3),
        )


def _floors(floor: Difference) -> tuple[float, float]:
    """Return the largest and the mean difference that rounding or arithmetic alone leaves."""
    noise = ARITHMETIC * floor.scale
    return max(floor.largest, noise), max(floor.mean, noise / 16)


def _mean_margin(difference: Difference) -> float:
    return MEAN_MARGIN if difference.classes > FEW else FEW_MARGIN


def _judge(difference: Difference, floor: Difference) -> Iterator[str]:
    """Yield a sentence for the mean and for the largest difference, if rounding does not explain it."""
    largest, mean = _floors(floor)
    yield from _excess("in the mean", difference.mean, mean, _mean_margin(difference))
    yield from _excess("at most", difference.largest, largest, LARGEST_MARGIN)


def _excess(how: str, error: float, floor: float, margin: float) -> Iterator[str]:
    if error > margin * floor:
        times = f"{error / floor:.3g} times" if floor else "more than"
        yield (
            f"the outputs differ {how} by {error:.2g}, {times} what rounding alone leaves ({floor:.2g}); "
            f"{margin:g} times is the most that correct merges leave"
        )
