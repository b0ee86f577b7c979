"""Say what is unusual in an adapter, which programs load it as it is, and which command makes it acceptable."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import Any

from ...adapters import Adapter, Decomposed, Delta, Full, LowRank, Rows, Transform, Update, transform_of
from ...naming.resolve import is_embedding, is_head
from ...reports.advice import LoaderAdvice
from ...storage.json_files import read_json
from ...storage.safetensors import StoredTensor
from .loaders import CONVERT, LOADERS, LORA, MERGE, REFUSES, Loader, LoaderRule

MOST_BYTES = 512 << 20
"""Bytes of factors that are read to find zeros."""
IMAGE_PARTS = frozenset(
    {"unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "diffusion_model", "down_blocks",
     "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "double_blocks", "single_blocks"}
)  # fmt: skip
"""First names of modules that image models have."""
NEED_BASE = ("kohya", "diffusers", "torchtune", "gguf")
"""Formats that `convert` reads or writes with a base only."""
TORCHTUNE_EXPORT = "torchtune, exported for PEFT"
HALF = ("BF16", "F16")
VLLM_RANK = 16
"""vLLM's largest rank without an option."""


def advise(adapter: Adapter, words: tuple[str, str | None], *, refused: bool) -> dict[str, Any]:
    """Return the report's fields of advice; `words` are REF and BASE on the command line."""
    advisor = Advisor(adapter, *words, refused=refused)
    return {"loaders": advisor.loaders(), "unusual": tuple(advisor.unusual()), "facts": facts_of(adapter)}


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """Return ranks, scalings, targets, kinds and axes over all modules."""
    updates = [change.update for change in adapter.changes]
    factors = [inner for update in updates if isinstance(inner := transform_of(update), LowRank)]
    return {
        "ranks": sorted({low.rank for low in factors}),
        "scalings": sorted({low.scale for low in factors if isfinite(low.scale)}),
        "targets": sorted({change.module.rpartition(".")[2] for change in adapter.changes}),
        "kinds": sorted({update.title.partition(",")[0] for update in updates}),
        "axes": sorted({update.axis for update in updates if isinstance(update, Decomposed)}),
    }


def features_of(adapter: Adapter) -> frozenset[str]:
    """Return the features of an adapter that programs may not take; `FEATURES` has their words."""
    found = {feature for change in adapter.changes for feature in _features(change.update, change.target)}
    plain = [low for change in adapter.changes if isinstance(low := transform_of(change.update), LowRank)]
    if len({low.rank for low in plain}) > 1 or len({low.scale for low in plain}) > 1:
        found.add("patterns")
    if len({round(low.scale * low.rank, 9) for low in plain}) > 1 and not any(low.rslora for low in plain):
        found.add("alphas")
    if any(low.rslora for low in plain):
        found.add("rslora")
    layout = layout_of(adapter)
    if "dora" in found and layout == "kohya":
        found = {*found, "kohya dora"} - {"dora"}
    if "dora" in found and layout == "peft" and not _config(adapter).get("use_dora"):
        found.add("unsaid dora")
    return frozenset(found)


def layout_of(adapter: Adapter) -> str:
    """Return the format that other programs take the files for: torchtune's export looks like PEFT's."""
    return "peft" if adapter.maker == TORCHTUNE_EXPORT else adapter.format


def _config(adapter: Adapter) -> dict[str, object]:
    """Return PEFT's config of an adapter; empty for other formats."""
    path = next((path for path in adapter.files if path.name == "adapter_config.json"), None)
    return read_json(path) if path and path.is_file() else {}


def _features(update: Update, target: str) -> Iterator[str]:
    """Yield the features of one change."""
    inner = transform_of(update)
    match update:
        case Decomposed(normalised=False, axis=axis):
            yield "dora"
            if axis == "columns":
                yield "dora by columns"
        case Full(copied=False):
            yield "biases" if target.endswith(".bias") else "whole"
        case Delta():
            yield "biases"
        case Rows():
            yield "rows"
    if isinstance(inner, LowRank):
        yield from _of_factors(inner, target)
    elif isinstance(inner, Transform) or (isinstance(update, Decomposed) and update.normalised):
        yield "other kinds"


def _of_factors(low: LowRank, target: str) -> Iterator[str]:
    """Yield the features of factors."""
    if low.experts:
        yield "experts"
    if len(low.A.shape) > 2:
        yield "convolutions"
    if is_embedding(target) or is_head(target):
        yield "embeddings"
    if low.start:
        yield "start"
    if low.d or low.b or low.blocks != (1, 1):
        yield "other kinds"
    if low.scale != 1:
        yield "scaled"


@dataclass(frozen=True)
class Advisor:
    """Advises on one adapter; `ref` and `base` are words of the command line."""

    adapter: Adapter
    ref: str
    base: str | None
    refused: bool = False

    def loaders(self) -> tuple[LoaderAdvice, ...]:
        """Return the verdict of each program."""
        features = features_of(self.adapter)
        return tuple(self._advise(loader, features) for loader in LOADERS)

    def _advise(self, loader: Loader, features: frozenset[str]) -> LoaderAdvice:
        """Return one program's verdict: of all rules that apply, a refusal counts before a wrong result."""
        name, source = loader.name, loader.source
        if loader.language == self._is_of_images:
            kind = "language" if loader.language else "image"
            return LoaderAdvice(loader=name, verdict="no", why=f"runs {kind} models", source=source, command=None)
        if self.refused and not self.adapter.changes:
            own = name == "PEFT" and layout_of(self.adapter) == "peft"
            why = "" if own else f"what {self.adapter.kind} does is not a plain change of weights, or not known here"
            return LoaderAdvice(loader=name, verdict="yes" if own else "no", why=why, source=source, command=None)
        rules = sorted((rule for rule in loader.rules if rule.feature in features), key=_severity)
        if layout_of(self.adapter) not in loader.formats:
            why = f"reads {' and '.join(loader.formats)} files, not {self.adapter.format}"
            remedy = next((rule.remedy for rule in rules), LORA if "other kinds" in features else CONVERT)
            command = self._command(remedy, loader)
            lossy = _is_lossy(command, features)
            return LoaderAdvice(loader=name, verdict="no", why=why, source=source, command=command, lossy=lossy)
        if rules:
            why = "; ".join(dict.fromkeys(rule.why for rule in rules))
            sources = "; ".join(dict.fromkeys(rule.source for rule in rules))
            remedy = MERGE if any(rule.remedy == MERGE for rule in rules) else rules[0].remedy
            command = self._command(remedy, loader)
            verdict, lossy = rules[0].verdict, _is_lossy(command, features)
            return LoaderAdvice(loader=name, verdict=verdict, why=why, source=sources, command=command, lossy=lossy)
        return LoaderAdvice(loader=name, verdict="yes", why=self._condition(loader), source=source, command=None)

    def _condition(self, loader: Loader) -> str:
        """Return a condition under which a program takes the adapter; "" for none."""
        rank = max((low.rank for low in self._factors), default=0)
        if loader.name == "vLLM" and rank > VLLM_RANK:
            return f"with --max-lora-rank {rank}"
        return "by its convert_lora_to_gguf.py" if loader.name == "llama.cpp" else ""

    @property
    def _factors(self) -> list[LowRank]:
        """The plain factors of all changes."""
        inner = (transform_of(change.update) for change in self.adapter.changes)
        return [each for each in inner if isinstance(each, LowRank)]

    @property
    def _is_of_images(self) -> bool:
        """True if the adapter's names are those of an image model."""
        tops = {part for change in self.adapter.changes for part in change.target.split(".")[:2]}
        kohya = any(
            change.target.startswith(("lora_unet", "lora_te", "lora_transformer")) for change in self.adapter.changes
        )
        return bool(tops & IMAGE_PARTS) or kohya

    def _command(self, remedy: str, loader: Loader) -> str | None:
        """Return the command that makes something the program takes."""
        base = self.base or self.adapter.base or "BASE"
        if remedy == CONVERT and find_spec("dora_convert.verbs.convert") and loader.writes:
            needed = self.adapter.format in NEED_BASE or loader.writes in NEED_BASE
            words = ["--base", base] if needed else []
            return shlex.join(["dora-convert", "convert", self.ref, "OUT", "--to", loader.writes, *words])
        ranks = [low.rank for low in self._factors]
        if remedy == LORA and ranks:
            return shlex.join(["dora-convert", "to-lora", base, self.ref, "OUT", "--rank", str(max(ranks))])
        return shlex.join(["dora-convert", "merge", base, self.ref, "OUT"])

    def unusual(self) -> Iterator[str]:
        """Yield a sentence on everything odd in the adapter."""
        yield from self._odd_scalings()
        yield from self._odd_magnitudes()
        yield from _zeros(self._factors, self.adapter)
        if self.adapter.maker == TORCHTUNE_EXPORT and "dora" in features_of(self.adapter):
            yield (
                "torchtune wrote the magnitudes of q and k in another order than lora_B, and does not announce them: "
                "PEFT computes other weights; dora-convert reads them right"
            )

    def _odd_scalings(self) -> Iterator[str]:
        """Yield a sentence on scalings that change nothing, turn the change round, or are very large."""
        for low in self._factors:
            if not isfinite(low.scale):
                yield "the files do not hold the scaling: --alpha or --scaling gives it"
            elif low.scale == 0:
                yield "a scaling is 0: the module's factors change nothing"
            elif low.scale < 0:
                yield f"a scaling is negative: {low.scale:g}"
            else:
                continue
            return

    def _odd_magnitudes(self) -> Iterator[str]:
        """Yield a sentence on magnitudes that are not announced, are coarse, or stand alone."""
        updates = [change.update for change in self.adapter.changes if isinstance(change.update, Decomposed)]
        if any(update.m.dtype in HALF for update in updates):
            coarse = next(update.m.dtype for update in updates if update.m.dtype in HALF)
            share = "0.4 %" if coarse == "BF16" else "0.05 %"
            yield f"magnitudes are stored as {coarse}: the length of a row is off by up to {share}"
        if alone := sum(update.inner is None and not update.normalised for update in updates):
            yield f"{alone} modules have magnitudes and no factors"
        if any(update.normalised and update.inner for update in updates):
            yield "magnitudes multiply V without a division by its norm: they are normalised"
        if "unsaid dora" in features_of(self.adapter):
            yield "there are magnitudes, but use_dora is not set in adapter_config.json"


def _is_lossy(command: str | None, features: frozenset[str]) -> bool:
    """Return True if a command approximates: factors of the same rank do not hold magnitudes or other kinds."""
    full = features & {"dora", "kohya dora", "unsaid dora", "other kinds"}
    return bool(full) and command is not None and command.startswith("dora-convert to-lora")


def _severity(rule: LoaderRule) -> bool:
    """Return False for a refusal, which is named before what is loaded wrong."""
    return rule.verdict != REFUSES


def _zeros(factors: Sequence[LowRank], adapter: Adapter) -> Iterator[str]:
    """Yield a sentence on factors that are zero, whole or in rows; the values of lora_B are read."""
    stored = [low.B for low in factors if type(low.B) is StoredTensor and low.B.path.is_file()]
    if sum(tensor.nbytes for tensor in stored) > MOST_BYTES:
        yield f"not looked for: zeros in {len(stored)} factors of more than {MOST_BYTES >> 20} MiB together"
        return
    whole = [tensor.name for tensor in stored if not any_byte(tensor)]
    if whole and len(whole) == len(stored):
        yield f"all {len(whole)} lora_B of {adapter.source.name} are zero: the adapter changes nothing"
    elif whole:
        yield f"{len(whole)} of {len(stored)} lora_B are zero, such as {whole[0]}: those modules were not trained"
    rows = [(zero_rows(tensor), tensor) for tensor in stored if tensor.name not in whole]
    if some := [(count, tensor) for count, tensor in rows if count]:
        count, tensor = max(some, key=lambda each: each[0] / each[1].shape[0])
        yield (
            f"{len(some)} lora_B have rows that are exactly zero, {tensor.name} {count} of {tensor.shape[0]}: "
            "outputs that training left alone, or a save of one rank of several"
        )


UNSIGNED = bytes(0 if byte == 0x80 else byte for byte in range(256))
"""Translates a byte that is a sign alone: −0 is zero, too."""


def _bytes_of(tensor: StoredTensor) -> bytes:
    """Return a tensor's bytes without lone signs: only zeros are all zero."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.nbytes).translate(UNSIGNED)


def any_byte(tensor: StoredTensor) -> bool:
    """Return True if a stored tensor has a byte that is not zero."""
    data = _bytes_of(tensor)
    return data.count(0) != len(data)


def zero_rows(tensor: StoredTensor) -> int:
    """Return the number of rows of a stored matrix whose bytes are all zero."""
    rows = tensor.matrix[0]
    data, width = _bytes_of(tensor), tensor.nbytes // max(1, rows)
    zero = bytes(width)
    if zero not in data:
        return 0
    return sum(data[start : start + width] == zero for start in range(0, len(data), width))
