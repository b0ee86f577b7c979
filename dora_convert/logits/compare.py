"""Run base and adapters, then a merged checkpoint, on the same prompts, and judge how far their outputs are apart.

The reference is PEFT's own forward, unmerged. Only one model is in memory at a time: what the reference says is kept on
disk. How far honest rounding takes the outputs is measured, too, on the reference itself.
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

from ..adapters.updates import LowRank
from ..engine.precision import TORCH, choose, full_precision
from ..errors import UnsupportedError, UsageError
from ..plan.plan import Plan
from ..reports.verify import OutputsReport
from ..settings import Settings
from ..sizes import format_size, peak_memory
from ..storage.checkpoint import Checkpoint
from ..storage.filenames import PICKLES
from .difference import Difference
from .forward import Batch, continues_alike
from .kept import Kept
from .memory import Room, estimate, find_room, skeleton
from .models import WEIGHTS_LEVEL, Loader, Spec, quiet, specify, view
from .rounding_floor import disturb
from .samples import Samples, make_samples, vocabulary

DRAWS = 3
"""How often the reference is moved by half a unit."""
MEAN_MARGIN, FEW_MARGIN, LARGEST_MARGIN = 2.0, 6.0, 8.0
"""How many times what rounding leaves a difference may be: in the mean, in the mean over few classes, and at most.

docs/verify.md has what honest merges leave.
"""
FEW = 100
"""Classes whose mean says less: all may move together."""
ARITHMETIC = 2.0**-17
"""Of the largest output: what float32 arithmetic in another order may leave, whatever the weights are stored in."""


@contextmanager
def prepared(plan: Plan, settings: Settings, texts: Sequence[str], limit: int | None) -> Iterator[Comparison]:
    """Everything that can be found out before a model is loaded; `limit` is the most memory to take, in bytes.

    Raises UnsupportedError for what cannot be compared this way, UsageError where memory does not suffice.
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
            room = _room(plan, spec, samples, limit, device)
        for note in samples.notes:
            settings.notify(note)
        how = "block by block from its files" if room.offload else "whole"
        settings.notify(
            f"outputs: {spec.name} on {device}, one model at a time, {how}; "
            f"about {format_size(room.nbytes)} of memory ({room.why})"
        )
        yield Comparison(plan, settings, spec, samples, room, Loader(device, room.offload, scratch), base)


def refuse(plan: Plan) -> None:
    """Refuse what no model was trained as, or cannot be loaded as, for want of something to compare with."""
    if any(adapter.format != "peft" for adapter in plan.adapters):
        raise UnsupportedError(
            "The outputs level runs adapters through PEFT, and one is not PEFT's.", hint=WEIGHTS_LEVEL
        )
    if plan.options.include or plan.options.exclude:
        raise UnsupportedError(
            "The outputs level compares with whole adapters, not with parts.", hint=WEIGHTS_LEVEL
        )
    if any(weight != 1 for weight in plan.weights):
        raise UnsupportedError("No model was trained at another --weight than 1.", hint=WEIGHTS_LEVEL)
    plain = all(
        adapter.kind == "LoRA" and all(isinstance(change.update, LowRank) for change in adapter.changes)
        for adapter in plan.adapters
    )
    if len(plan.adapters) > 1 and not plain:
        raise UnsupportedError(
            "Several adapters were not trained together: only the sum of plain LoRAs is a model to compare with.",
            hint=WEIGHTS_LEVEL,
        )


def _room(plan: Plan, spec: Spec, samples: Samples, limit: int | None, device: torch.device) -> Room:
    bare = skeleton(spec.model_class, spec.config)
    need = estimate(bare, spec.config, plan, samples.tokens, samples.longest)
    room = find_room(need, limit, device)
    if room.offload:
        _refuse_offload(plan.base)
        if any(item.start for item in plan.items):
            raise UsageError(
                "An adapter whose training changed the base (PiSSA and the like) is only compared whole.",
                hint=f"--max-memory {-(-need.whole // 2**20)}MiB",
            )
    return room


def _refuse_offload(checkpoint: Checkpoint) -> None:
    if any(shard.filename.endswith(PICKLES) for shard in checkpoint.shards):
        raise UnsupportedError(
            f"{checkpoint.source.name} is too large to be loaded whole, and only safetensors are read block by block.",
            hint=WEIGHTS_LEVEL,
        )


@dataclass
class Comparison:
    """A reference that is ready to be run, and what it is run on. Nothing is loaded yet."""

    plan: Plan
    settings: Settings
    spec: Spec
    samples: Samples
    room: Room
    loader: Loader
    base: Path
    draw: int = 0
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)

    def against(self, merged: Checkpoint) -> OutputsReport:
        """Run both models, and compare what they say.

        Raises UnsupportedError where one of them cannot be run, or the reference says what is no number.
        """
        if self.room.offload:
            _refuse_offload(merged)
        started = time.monotonic()
        self.stored = {t.name: TORCH[t.dtype] for t in merged.tensors.values() if t.dtype in TORCH}
        kept = Kept(self.loader.scratch / "kept")
        with quiet(), full_precision():
            folder = view(merged, self.loader.scratch / "merged")
            theirs = specify(folder, merged.config)
            batches, floor = self._reference(kept)
            gc.collect()
            found, alike, problems = self._merged(theirs, folder, batches, kept)
        return self._report(merged, found, floor, alike, problems, started)

    def _reference(self, kept: Kept) -> tuple[list[Batch], Difference]:
        """What base and adapters say, kept; and how far that moves when weights move by half a unit."""
        wanted, known = self._vocabularies()
        runner = self.loader.reference(
            self.spec, self.base, self.plan.adapters, wanted if wanted != known else None, self._loaded
        )
        batches = [runner.extend(prompt) for prompt in self.samples.batches]
        for number, batch in enumerate(batches):
            outputs = runner.outputs(batch)
            if outputs.isnan().any():
                raise UnsupportedError(
                    "What base and adapter say is not a number.", hint="do they belong together?"
                )
            kept[f"{number}"] = kept[f"{number}.moved"] = outputs
        floor = Difference()
        for self.draw in range(1, DRAWS + 1):
            if not self.room.offload:
                self._disturb("", runner.model.get_base_model(), self.draw)
            for number, batch in enumerate(batches):
                outputs = runner.outputs(batch)
                floor.add(kept[f"{number}.moved"], outputs)
                kept[f"{number}.moved"] = outputs
        return batches, floor

    def _vocabularies(self) -> tuple[int, int]:
        """How many tokens the trained model knows, and how many the base."""
        known = vocabulary(self.spec.config)
        config = self.plan.output_config or {}
        inner = config.get("text_config") or {}
        return config.get("vocab_size") or inner.get("vocab_size") or known, known

    def _loaded(self, name: str, module: nn.Module) -> None:
        """A block was read from its files: move its weights as often as they have been moved by now."""
        for draw in range(1, self.draw + 1):
            self._disturb(name, module, draw)

    def _disturb(self, prefix: str, module: nn.Module, draw: int) -> None:
        usual, _ = Counter(self.stored.values()).most_common(1)[0]
        disturb(module, prefix, self.stored, usual, draw)

    def _merged(
        self, spec: Spec, folder: Path, batches: Sequence[Batch], kept: Kept
    ) -> tuple[Difference, int | None, list[str]]:
        """What the merged checkpoint says of the same tokens, compared; and how many prompts it continues alike."""
        found = Difference()
        if spec.name != self.spec.name:
            return found, None, [f"config.json names {spec.name}; it should be {self.spec.name}"]
        runner, missing = self.loader.run(spec, folder)
        problems = [f"{name} is missing from MERGED" for name in sorted(missing)]
        alike = 0
        for number, batch in enumerate(batches):
            outputs, reference = runner.outputs(batch), kept[f"{number}"]
            if outputs.shape != reference.shape:
                shapes = f"{list(outputs.shape)}; it should be {list(reference.shape)}"
                return found, None, [*problems, f"an output's shape is {shapes}"]
            found.add(reference, outputs)
            alike += continues_alike(batch, outputs) if runner.generates else 0
        return found, alike if runner.generates else None, problems

    def _report(
        self,
        merged: Checkpoint,
        found: Difference,
        floor: Difference,
        alike: int | None,
        problems: list[str],
        started: float,
    ) -> OutputsReport:
        noise = ARITHMETIC * floor.scale
        largest, mean = max(floor.largest, noise), max(floor.mean, noise / 16)
        margin = MEAN_MARGIN if found.classes > FEW else FEW_MARGIN
        problems += _beyond("in the mean", found.mean, mean, margin)
        problems += _beyond("at most", found.largest, largest, LARGEST_MARGIN)
        count = max(1, found.positions)
        return OutputsReport(
            base=self.plan.base.source.address,
            adapters=tuple(adapter.source.address for adapter in self.plan.adapters),
            merged=merged.source.address,
            verdict="differ" if problems else "agree",
            architecture=self.spec.name,
            prompts=self.samples.count,
            positions=found.positions,
            max_abs_logit_error=found.largest,
            mean_abs_logit_error=found.mean,
            rounding_floor=largest,
            mean_rounding_floor=mean,
            mean_margin=margin,
            max_margin=LARGEST_MARGIN,
            mean_kl=found.divergence / count,
            top1_agreement=found.agreeing / count,
            greedy_agreement=None if alike is None else alike / self.samples.count,
            device=str(self.loader.device),
            offloaded=self.room.offload,
            memory_bytes=self.room.nbytes,
            peak_memory_bytes=peak_memory(),
            problems=tuple(problems),
            notes=self.samples.notes,
            warnings=tuple(self.settings.warnings),
            seconds=round(time.monotonic() - started, 3),
        )


def _beyond(how: str, error: float, floor: float, margin: float) -> Iterator[str]:
    """Whether a difference is more than rounding can have left, in words."""
    if error > margin * floor:
        times = f"{error / floor:.3g} times" if floor else "more than"
        yield (
            f"the outputs differ {how} by {error:.2g}, {times} what rounding alone leaves ({floor:.2g}); "
            f"{margin:g} times is the most that honest merges leave"
        )
