"""Decide by the base's values what an adapter's files leave open about its magnitudes.

axis        `dora_scale` without a second dimension, on a square weight: norms by rows, or by columns
magnitudes  TensorRT-LLM's normalize_weights.py writes m/‖V‖ under PEFT's name for m: norms, or normalised
order       torchtune's exporter leaves magnitudes of q_proj and k_proj in Meta's order: the base's, or Meta's

A trained m stays near the norms of the weight that it was trained on. So the right reading of m has the smallest
spread of log(m/‖W‖). Only samples of some weights are read. The decision is one for the whole adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ..adapters import Adapter, Change, Decomposed, LowRank, Update
from ..errors import Fault, UnsupportedError
from ..storage.checkpoint import Checkpoint
from ..storage.reader import Reader
from ..storage.safetensors import FLOATS, StoredTensor
from .stored_numbers import Questions, answered, lines_of, log_of, logs_of, norms_of, numbers_of, vector

CERTAIN = 5.0
"""The logarithm of the ratio of two spreads counts if it is this many times 1/√n, for n magnitudes: 3.5 deviations."""
LEAST_SPREAD = 1e-9
SURE = 1.5
"""One reading counts if the other one's spread is so many times larger."""
MODULES, FEW_ROWS, ROWS = 6, 48, 512
"""Weights that are sampled, and rows of each: few for a first look, which usually decides."""
TOGETHER = 64
"""Rows that are read together."""
CLOSE = 0.25
"""Magnitudes that differ less from the norms of W are not compared with those of V."""
NEAR_ONE = 0.5
"""Magnitudes whose median is farther from 1 are not normalised."""
NEVER_NEAR = 0.02
"""Norms whose logarithms are smaller than this make no difference."""
ROTARY = (".q_proj", ".k_proj")
META_ORDER = frozenset({"llama", "mistral", "gemma", "gemma2"})
"""Families whose q and k torchtune keeps in Meta's order."""
Find = Callable[[str], str | None]


class MagnitudeSample(NamedTuple):
    """Logarithms of some rows' norms and of their magnitudes; None for what is not positive."""

    rows: Sequence[int]
    norms: Sequence[float]
    m: Sequence[float]
    """All magnitudes."""
    changed: Sequence[float] = ()
    """The rows' norms with the adapter's factors added: what an m of this very adapter is the norm of."""


def decide(adapter: Adapter, find: Find, base: Checkpoint, later: Questions | None = None) -> Adapter:
    """Return an adapter with all of this decided, and with a warning for each decision that is not the usual one.

    Decisions of an earlier merge, in `adapter.decided`, count as they are. A question that waits for torch goes to
    `later`, if given; until then, the usual answer counts. Raises UnsupportedError if the axis is not decided and
    the base does not tell.
    """
    if not any(_magnitudes(change.update) for change in adapter.changes):
        return adapter
    decided = dict(adapter.decided)
    if any(_is_open(change.update) for change in adapter.changes):
        decided.setdefault("axis", _axis(adapter, find, base))
    elif adapter.format == "peft" and not adapter.decided and _is_here(base):
        decided |= answered(partial(_of_peft, adapter, find, base), later)
    if not decided:
        return adapter
    changes = tuple(_read_as(change, decided, base) for change in adapter.changes)
    sentences = tuple(_report(adapter, decided))
    return replace(adapter, changes=changes, decided=decided, warnings=(*adapter.warnings, *sentences))


def _report(adapter: Adapter, decided: dict[str, str]) -> Iterator[str]:
    """Yield a sentence for each decision that changes the reading of a file."""
    name = adapter.source.name
    if axis := decided.get("axis"):
        yield f"the norms of {name} are by {axis}, as the base's weights show; --axis says otherwise"
    if decided.get("magnitudes") == "normalised":
        yield f"the magnitudes of {name} are divided by their norms already (TensorRT-LLM's): they multiply rows"
    if decided.get("order") == "meta":
        yield f"the magnitudes of q_proj and k_proj of {name} are in Meta's order (torchtune's export): put back"


def _magnitudes(update: Update) -> Decomposed | None:
    """Return the update that sets magnitudes, the first choice if there are several."""
    first = getattr(update, "choices", (update,))[0]
    return first if isinstance(first, Decomposed) and not first.normalised else None


def _is_open(update: Update) -> bool:
    return hasattr(update, "choices")


def _is_here(base: Checkpoint) -> bool:
    return base.is_here


def _read_as(change: Change, decided: dict[str, str], base: Checkpoint) -> Change:
    """Return a change read as was decided."""
    update = change.update
    if _is_open(update) and "axis" in decided:
        choices: Sequence[Decomposed] = update.choices  # type: ignore[attr-defined] # Undecided
        return replace(change, update=next(choice for choice in choices if choice.axis == decided["axis"]))
    if not isinstance(update, Decomposed):
        return change
    if decided.get("magnitudes") == "normalised":
        return replace(change, update=replace(update, normalised=True))
    if decided.get("order") == "meta" and (rows := _meta_rows(change, base)):
        from ..storage.stored_view import view

        return replace(change, update=replace(update, m=view(update.m, rows)))
    return change


def _samples(
    changes: Sequence[Change], find: Find, base: Checkpoint, axis: int = 1, most: int = ROWS
) -> list[MagnitudeSample]:
    """Return samples of some changes whose weights the base has as matrices of the right size."""
    samples: list[MagnitudeSample] = []
    with closing(Reader()) as reader:
        for change in changes:
            update, name = _magnitudes(change.update), find(change.target)
            W = base.tensors.get(name) if name else None
            if not update or not W or type(W) is not StoredTensor or W.dtype not in FLOATS or len(samples) == MODULES:
                continue
            if W.matrix[1 - axis] == update.m.numel:
                samples.append(_sample(W, update, axis, reader, most))
    return samples


def _sample(W: StoredTensor, update: Decomposed, axis: int, reader: Reader, most: int) -> MagnitudeSample:
    """Return the norms of some rows, or those of all columns as far as some rows tell, and all magnitudes."""
    height, width = W.matrix
    count = min(most, height)
    chosen = sorted({round(k * (height - 1) / max(1, count - 1)) for k in range(count)})
    if axis == 0:
        lines = (lines_of(W, [row], reader) for row in chosen)
        norms = [math.hypot(*column) for column in zip(*(numbers_of(line, W.dtype) for line in lines), strict=True)]
    else:
        parts = (chosen[start : start + TOGETHER] for start in range(0, len(chosen), TOGETHER))
        few = count <= FEW_ROWS
        norms = [norm for part in parts for norm in norms_of(lines_of(W, part, reader), W, few=few)]
    factor = 1 if axis == 1 else math.sqrt(height / len(chosen))
    logs = [log_of(norm * factor) for norm in norms]
    m = logs_of(bytearray().join(reader.pieces(update.m)), update.m.dtype)
    sample = MagnitudeSample(chosen if axis == 1 else range(width), logs, m, [])
    is_near_one = statistics.median(map(abs, m)) < NEAR_ONE
    if axis == 0 or not is_near_one or statistics.median(map(abs, _ratios(sample))) < CLOSE:
        return sample
    return sample._replace(changed=_changed(W, chosen, update, reader))


def _changed(W: StoredTensor, chosen: Sequence[int], update: Decomposed, reader: Reader) -> list[float]:
    """Return the logarithms of the norms of some rows of V = W + sBA; empty if V is of another kind."""
    low = update.inner
    if not isinstance(low, LowRank) or low.A.matrix[1] != W.matrix[1] or low.d or low.b or low.start:
        return []
    A, B = (vector(bytearray().join(reader.pieces(each)), each.dtype).view(each.matrix) for each in (low.A, low.B))
    lines = ((row, vector(lines_of(W, [row], reader), W.dtype)) for row in chosen)
    return [log_of(float((line + low.scale * B[row] @ A).norm())) for row, line in lines]


def _spread(differences: Sequence[float]) -> float:
    """Return the spread of some numbers: half of the middle two thirds' width, so that few odd ones do not count."""
    numbers = sorted(number for number in differences if math.isfinite(number))
    if len(numbers) < 4:
        return math.inf
    return (numbers[-1 - len(numbers) // 6] - numbers[len(numbers) // 6]) / 2


def _axis(adapter: Adapter, find: Find, base: Checkpoint) -> str:
    """Return the axis of magnitudes on square weights."""
    opened = [change for change in adapter.changes if _is_open(change.update)]
    if not _is_here(base):
        raise _undecided(opened, "the base is not on this machine")
    certainty = _certainty(*(_samples(opened, find, base, axis) for axis in (1, 0)))
    if abs(certainty) < CERTAIN:
        raise _undecided(opened, "the base's norms fit both")
    return "rows" if certainty > 0 else "columns"


def _certainty(one: Sequence[MagnitudeSample], other: Sequence[MagnitudeSample]) -> float:
    """Return √n times the mean logarithm of the ratio of spreads: positive if the first reading fits better."""
    pairs = [(_spread(_ratios(a)), _spread(_ratios(b)), len(a.rows)) for a, b in zip(one, other, strict=False)]
    pairs = [pair for pair in pairs if math.isfinite(pair[0]) and math.isfinite(pair[1])]
    if not pairs:
        return 0.0
    logs = [math.log(max(b, LEAST_SPREAD) / max(a, LEAST_SPREAD)) for a, b, _ in pairs]
    return statistics.fmean(logs) * math.sqrt(sum(count for *_, count in pairs))


def _undecided(changes: Sequence[Change], why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{len(changes)} magnitudes may be by rows or by columns: {why}.",
        faults=[Fault(change.module, "its weight is square, and its dora_scale is a vector") for change in changes],
        hint="--axis rows (LyCORIS since 3.2) or --axis columns (before)",
    )


def _ratios(sample: MagnitudeSample) -> list[float]:
    """Return log(m/‖W‖) of the sampled rows."""
    return [sample.m[row] - norm for row, norm in zip(sample.rows, sample.norms, strict=True)]


def _of_peft(adapter: Adapter, find: Find, base: Checkpoint) -> dict[str, str]:
    """Return the decisions on a PEFT DoRA that differ from the usual ones."""
    changes = [change for change in adapter.changes if _magnitudes(change.update)]
    is_rotary = bool(base.model_types & META_ORDER)
    rotary = [change for change in changes if change.module.endswith(ROTARY)] if is_rotary else []
    if rotary and _is_meta(rotary, find, base):
        return {"order": "meta"}
    step = max(1, len(changes) // MODULES)
    if _fit_norms(_samples(changes[::step], find, base, most=FEW_ROWS)):
        return {}
    samples = _samples(changes[::step], find, base)
    return {"magnitudes": "normalised"} if samples and _are_normalised(samples) else {}


def _fit_norms(samples: Sequence[MagnitudeSample]) -> bool:
    """Return True if magnitudes are nearer to the norms of the weights than to 1, by a first look at few rows."""
    from_one = [_median(map(abs, sample.m)) for sample in samples]
    from_norms = [_median(map(abs, _ratios(sample))) for sample in samples]
    return not samples or statistics.median(from_one) > statistics.median(from_norms)


def _are_normalised(samples: Sequence[MagnitudeSample]) -> bool:
    """Return True if magnitudes are near 1 in every module, and nearer to 1 than to the norms of the weights."""
    samples = [sample for sample in samples if all(map(math.isfinite, (*sample.m, *sample.norms)))]
    if not samples:
        return False
    from_one = [_median(map(abs, sample.m)) for sample in samples]
    from_norms = [_median(map(abs, _ratios(sample))) for sample in samples]
    from_norms = [min(far, _from_changed(sample)) for far, sample in zip(from_norms, samples, strict=True)]
    norms = [abs(_median(sample.norms)) for sample in samples]
    if not max(from_one) <= NEAR_ONE or statistics.median(norms) < NEVER_NEAR:
        return False
    if statistics.median(from_one) * SURE > statistics.median(from_norms):
        return False
    # weights of another base: m is as far from ‖W‖ in every module, rather than near 1 in every module
    means = [(_median(s.m), _median(_ratios(s))) for s in samples]
    means = [pair for pair in means if all(map(math.isfinite, pair))]
    if len(means) < 2:
        return True
    return statistics.stdev(one for one, _ in means) <= statistics.stdev(other for _, other in means)


def _from_changed(sample: MagnitudeSample) -> float:
    """Return the distance of magnitudes from the norms of V = W + sBA, infinity if they are not known."""
    pairs = zip(sample.rows, sample.changed, strict=False)
    return _median(abs(sample.m[row] - norm) for row, norm in pairs)


def _median(values: Iterable[float]) -> float:
    """Return the median of the finite values, infinity if there are none: a damaged base may hold NaN."""
    return statistics.median([value for value in values if math.isfinite(value)] or [math.inf])


def _is_meta(changes: Sequence[Change], find: Find, base: Checkpoint) -> bool:
    """Return True if magnitudes fit the norms of the rows in Meta's order, and do not fit them as they are."""
    certainty = 0.0
    for most in (FEW_ROWS, ROWS):
        plain, meta = [], []
        for change in changes[:MODULES]:
            rows = _meta_rows(change, base)
            for sample in _samples([change], find, base, most=most) if rows else ():
                plain.append(sample)
                meta.append(sample._replace(m=[sample.m[row] for row in rows]))
        certainty = _certainty(meta, plain)
        if certainty <= -CERTAIN:
            return False
    return certainty >= CERTAIN


def _meta_rows(change: Change, base: Checkpoint) -> tuple[int, ...]:
    """Return, for each row of q_proj or k_proj, its number in Meta's order; () for other modules."""
    update = _magnitudes(change.update)
    if not update or not change.module.endswith(ROTARY) or not isinstance(update.inner, LowRank | None):
        return ()
    from ..adapters.rotary import head_size, meta_rows

    outputs = update.m.numel
    size = head_size(base, outputs, change.module)
    return meta_rows(outputs, size) if size and outputs % size == 0 else ()
