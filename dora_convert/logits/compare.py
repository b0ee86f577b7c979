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
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..adapters import Adapter, LowRank
from ..engine.precision import TORCH, choose, full_precision
from ..errors import UnsupportedError, UsageError
from ..plan.plan import Plan
from ..reports.verify import Continuation, OutputsReport
from ..settings import Settings, format_size, peak_memory
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import PICKLES
from .difference import Difference
from .forward import CONTINUATION, Batch, ModelRunner, OutputFiles, chosen, continues_alike, not_compared
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
            samples = make_samples(texts, folders, spec.name, spec.config, _new_vocabulary(plan, spec))
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


def _new_vocabulary(plan: Plan, spec: ModelSpec) -> int | None:
    """Return the trained model's number of tokens; None if it is the base's."""
    config = plan.output_config or {}
    size: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return None if size == vocabulary(spec.config) else size


def refuse(plan: Plan) -> None:
    """Raise UnsupportedError if the adapters were not trained as one model, or cannot be loaded as one."""
    if files := [file.name for adapter in plan.adapters for file in adapter.beside if file.fate == "applied"]:
        reason = f"PEFT runs an adapter without the weights beside it: {', '.join(files)}."
    elif any(adapter.format != "peft" for adapter in plan.adapters):
        reason = "The outputs level runs adapters through PEFT, and one is not PEFT's."
    elif plan.options.include or plan.options.exclude:
        reason = "The outputs level compares with whole adapters, not with parts."
    elif not plan.options.combination.is_sum:
        reason = f"No model runs adapters combined by --method {plan.options.combination.method}."
    elif any(weight != 1 for weight in plan.weights):
        reason = "No model was trained at another --weight than 1."
    elif len(plan.adapters) > 1 and not all(map(_is_plain, plan.adapters)):
        reason = "Several adapters were not trained together: only a sum of plain LoRAs can be compared."
    else:
        return
    raise not_compared(reason)


def _is_plain(adapter: Adapter) -> bool:
    return adapter.kind == "LoRA" and all(isinstance(change.update, LowRank) for change in adapter.changes)


def _choose_memory(
    plan: Plan, spec: ModelSpec, samples: Samples, limit: int | None, device: torch.device
) -> MemoryChoice:
    need = estimate(skeleton(spec.model_class, spec.config), spec.config, plan, samples.tokens, samples.longest)
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
        name = checkpoint.source.name
        raise not_compared(f"{name} is too large for memory; only safetensors are read block by block.")


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
    passes: int = 0
    """Passes over a batch so far."""
    continuations: list[Continuation] = field(default_factory=list)

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
        limits = Limits.of(difference, floor)
        problems += limits.excesses(difference)
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
            rounding_floor=limits.largest,
            mean_rounding_floor=limits.mean,
            mean_margin=limits.mean_margin,
            max_margin=LARGEST_MARGIN,
            mean_kl=difference.divergence / count,
            top1_agreement=difference.agreeing / count,
            greedy_agreement=None if alike is None else alike / self.samples.count,
            device=str(self.loader.device),
            offloaded=self.memory.offload,
            memory_bytes=self.memory.nbytes,
            peak_memory_bytes=peak_memory(),
            continuations=tuple(self.continuations),
            problems=tuple(problems),
            notes=self.samples.notes,
            warnings=tuple(self.settings.warnings),
            seconds=round(time.monotonic() - started, 3),
        )

    def _watched(self, phase: str, runner: ModelRunner) -> ModelRunner:
        """Say that a phase begins, and return its runner with a count of its passes."""
        self.settings.notify(f"outputs: {phase}")
        each = 1 + DRAWS + 1 + (CONTINUATION if runner.generates else 0)
        total = each * len(self.samples.batches)

        def count() -> None:
            self.passes += 1
            if self.settings.on_progress:
                weights = self.plan.bytes_out
                self.settings.on_progress(self.passes * weights, total * weights)

        return replace(runner, on_pass=count)

    def _reference(self, kept: OutputFiles) -> tuple[list[Batch], Difference]:
        """Keep the outputs of base and adapters, and measure their change under perturbed weights."""
        new = _new_vocabulary(self.plan, self.spec)
        runner = self.loader.reference(self.spec, self.base, self.plan.adapters, vocabulary=new, on_load=self._perturb)
        runner = self._watched("base + adapter", runner)
        batches = [runner.extend(prompt) for prompt in self.samples.batches]
        for number, batch in enumerate(batches):
            outputs = runner.outputs(batch)
            if outputs.isnan().any():
                hint = "do they belong together?"
                raise UnsupportedError("The outputs of base and adapter are not numbers.", hint=hint)
            kept[f"{number}"] = kept[f"{number}.moved"] = outputs
        floor = Difference()
        self.settings.notify(f"outputs: base + adapter with rounded weights, {DRAWS} times")
        for self.draw in range(1, DRAWS + 1):
            if not self.memory.offload:
                self._perturb("", runner.model.get_base_model(), first=self.draw)
            for number, batch in enumerate(batches):
                outputs = runner.outputs(batch)
                floor.add(kept[f"{number}.moved"], outputs)
                kept[f"{number}.moved"] = outputs
        return batches, floor

    def _perturb(self, prefix: str, module: nn.Module, first: int = 1) -> None:
        """Perturb a module by all draws from the `first`; one that was read from its files has none yet."""
        usual, _ = Counter(self.stored.values()).most_common(1)[0]
        for draw in range(first, self.draw + 1):
            perturb(module, prefix, self.stored, usual, draw)

    def _compare(
        self, spec: ModelSpec, folder: Path, batches: Sequence[Batch], kept: OutputFiles
    ) -> tuple[Difference, int | None, list[str]]:
        """Return the merged checkpoint's difference, its prompts continued alike, and its problems."""
        difference = Difference()
        if spec.name != self.spec.name:
            return difference, None, [f"config.json names {spec.name}; it should be {self.spec.name}"]
        runner, missing = self.loader.checkpoint(spec, folder)
        runner = self._watched("merged", runner)
        problems = [f"{name} is missing from MERGED" for name in sorted(missing)]
        alike = 0
        for number, batch in enumerate(batches):
            outputs, reference = runner.outputs(batch), kept[f"{number}"]
            if outputs.shape != reference.shape:
                shapes = f"{list(outputs.shape)}; it should be {list(reference.shape)}"
                return difference, None, [*problems, f"an output's shape is {shapes}"]
            difference.add(reference, outputs)
            if runner.generates:
                alike += continues_alike(batch, outputs)
                self._keep_texts(batch, outputs)
        return difference, alike if runner.generates else None, problems

    def _keep_texts(self, batch: Batch, outputs: Tensor) -> None:
        """Keep the prompts of a batch and both models' continuations, if there is a tokenizer."""
        if not (decode := self.samples.decode):
            return
        for ids, tokens, other in zip(batch.ids, batch.tokens, chosen(outputs), strict=True):
            prompt = ids if batch.answer is not None else ids[:-CONTINUATION]
            texts = (decode(row.tolist()) for row in (prompt, tokens[-CONTINUATION:], other))
            self.continuations.append(Continuation(*texts))


@dataclass(frozen=True)
class Limits:
    """The differences that rounding or arithmetic alone leaves, and the multiple of their mean that is allowed."""

    largest: float
    mean: float
    mean_margin: float

    @classmethod
    def of(cls, difference: Difference, floor: Difference) -> Limits:
        """Return the limits of a difference from the difference that perturbed weights make."""
        noise = ARITHMETIC * floor.scale
        margin = MEAN_MARGIN if difference.classes > FEW else FEW_MARGIN
        return cls(max(floor.largest, noise), max(floor.mean, noise / 16), margin)

    def excesses(self, difference: Difference) -> Iterator[str]:
        """Yield a sentence for the mean and for the largest difference, if rounding does not explain it."""
        for how, error, floor, margin in (
            ("in the mean", difference.mean, self.mean, self.mean_margin),
            ("at most", difference.largest, self.largest, LARGEST_MARGIN),
        ):
            if error > margin * floor:
                times = f"{error / floor:.3g} times" if floor else "more than"
                yield (
                    f"the outputs differ {how} by {error:.2g}, {times} what rounding alone leaves ({floor:.2g}); "
                    f"{margin:g} times is the most that correct merges leave"
                )
