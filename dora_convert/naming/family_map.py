"""Map names of a running model to a checkpoint's tensors and back, by the table of families.

A converter of the table is a rearrangement: a stack of experts, a concatenation, a part of one tensor, a permutation
of rows. Each becomes slots. Whatever cannot be said with slots is refused by the operation's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from ..storage.module_names import kinds_of, modules_of
from ..storage.safetensors import StoredTensor
from .slots import Slot
from .table import Config, Family, Place, Rule

STACKED = 3
"""The dimensions of a stack of experts that is one tensor."""


class Piece(NamedTuple):
    """One stored tensor that a weight of the running model is made of."""

    name: str  # on disk
    rule: Rule | None
    source: int
    target: int  # the position of the weight among the rule's targets
    lost: tuple[int, ...]


class Refused(Exception):  # noqa: N818 # a reason, not a fault of the program
    """A weight of the running model is made of stored tensors in a way that slots do not say."""


class FamilyMap:
    """The names of one checkpoint's tensors in the running model. A `NameMap`."""

    def __init__(self, tensors: Mapping[str, StoredTensor], family: Family, config: Config) -> None:
        self._tensors, self.family, self._config = tensors, family, config
        self._weights: dict[str, list[Piece]] = {}
        self._names: dict[str, str] = {}
        family.notice(tensors)
        for name in tensors:
            place = family.place(name)
            for target, weight in enumerate(_weights(place)):
                self._weights.setdefault(weight, []).append(Piece(name, place.rule, place.source, target, place.lost))
                self._names.setdefault(name, weight)

    def stored(self, target: str) -> tuple[Slot, ...] | None:
        """Return the slots of a weight of the running model, or of a weight of another layout on disk.

        None if the table leads to no tensor, or to tensors that contradict the table; `refusal` has the reason.
        """
        try:
            return self._slots(target)
        except Refused:
            return None

    def refusal(self, target: str) -> str | None:
        """Return why a weight of the running model has no slots; None if no tensor is part of it."""
        try:
            self._slots(target)
        except Refused as error:
            return str(error)
        return None

    def running(self, name: str) -> str | None:
        """Return the first weight of the running model that a stored tensor is part of."""
        return self._names.get(name)

    def renamed(self, target: str) -> str:
        """Return the name in the running model of a name that may be another layout's."""
        return target if target in self._weights else self.family.place(target).name

    @property
    def weights(self) -> Mapping[str, Sequence[Piece]]:
        """Every weight of the running model, with the tensors that make it."""
        return self._weights

    @cached_property
    def _pieces(self) -> Mapping[tuple[object, ...], str]:
        """Every tensor that a rule rearranges, by its place."""
        pieces = ((weight, piece) for weight, pieces in self._weights.items() for piece in pieces if piece.rule)
        return {(weight, piece.rule, piece.source, piece.lost): piece.name for weight, piece in pieces}

    @cached_property
    def modules(self) -> Mapping[str, Sequence[str]]:
        """Every module of the running model that owns a weight, by the name of its parent."""
        return modules_of(self._weights)

    @cached_property
    def module_kinds(self) -> tuple[str, ...]:
        """Every module's name with `*` for its numbers, once each."""
        return kinds_of(self.modules)

    def shape(self, weight: str) -> tuple[int, ...]:
        """Return the shape of a weight of the running model; its sizes are a tensor's, its dimensions are right."""
        piece = self._weights[weight][0]
        stack = piece.rule is not None and piece.rule.operations[0] in {"stack", "share experts"}
        return (*([1] if stack else []), *self._tensors[piece.name].shape)

    def _slots(self, target: str) -> tuple[Slot, ...] | None:
        if pieces := self._weights.get(target):
            return self._of_pieces(target, pieces)
        place = self.family.place(target)
        if (pieces := self._weights.get(place.name)) is None:
            return None
        if place.rule is None:
            return self._of_pieces(place.name, pieces)
        if twin := self._pieces.get((place.name, place.rule, place.source, place.lost)):
            return (Slot(twin),)
        return self._of_part(place, self._of_pieces(place.name, pieces))

    def _of_pieces(self, weight: str, pieces: Sequence[Piece]) -> tuple[Slot, ...]:
        """Return the slots of a weight whose pieces are known."""
        rules = {piece.rule for piece in pieces}
        rule = pieces[0].rule
        if len(rules) > 1 or (rule is None and len(pieces) > 1):
            raise Refused(f"{' and '.join(sorted(piece.name for piece in pieces)[:3])} are all {weight} in the model")
        if rule is None:
            return (Slot(pieces[0].name),)
        match rule.operations:
            case ("stack", *rest) if not rest or rest == ["concatenate 1"]:
                return self._stack(weight, pieces, len(rule.numbers))
            case ("concatenate 0",) | ("concatenate 1",):
                return self._one_below_the_other(weight, pieces, rule)
            case ("share experts",):
                return self._stack(weight, _share(pieces, len(rule.targets)), len(rule.numbers))
        if len(pieces) > 1:
            raise Refused(f"{' and '.join(sorted(piece.name for piece in pieces)[:3])} are all {weight} in the model")
        return (self._single(weight, pieces[0], rule),)

    def _stack(self, weight: str, pieces: Sequence[Piece], sources: int) -> tuple[Slot, ...]:
        """Return the slots of a stack of experts, in their natural order; each of `sources` is one below the other."""
        columns = [sorted((piece for piece in pieces if piece.source == k), key=_lost) for k in range(sources)]
        count = len(columns[0])
        if any([_lost(piece) for piece in column] != [(k,) for k in range(count)] for column in columns):
            raise Refused(f"{weight} is a stack of experts, and the base does not have each of them once")
        spans = list(self._spans(weight, [column[0].name for column in columns]))
        shapes = [{self._tensors[piece.name].shape for piece in column} for column in columns]
        if any(len(shape) > 1 for shape in shapes):
            raise Refused(f"{weight} is a stack of experts, and they have different shapes in the base")
        return tuple(
            Slot(piece.name, outputs=span if sources > 1 else None, expert=expert, experts=count)
            for column, span in zip(columns, spans, strict=True)
            for expert, piece in enumerate(column)
        )

    def _one_below_the_other(self, weight: str, pieces: Sequence[Piece], rule: Rule) -> tuple[Slot, ...]:
        ordered, sources = sorted(pieces, key=lambda piece: piece.source), len(rule.numbers)
        if [piece.source for piece in ordered] != list(range(sources)):
            raise Refused(f"{weight} is made of {sources} tensors, and the base has {len(ordered)} of them")
        spans = self._spans(weight, [piece.name for piece in ordered], int(rule.operations[0][-1]))
        return tuple(Slot(piece.name, outputs=span) for piece, span in zip(ordered, spans, strict=True))

    def _spans(self, weight: str, names: Sequence[str], axis: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the outputs of a weight that each of its tensors holds: rows, or rows of each expert for axis 1."""
        start = 0
        for name in names:
            shape = self._tensors[name].shape
            if len(shape) <= axis or (axis and len(shape) != STACKED):
                raise Refused(f"{weight} is made of {name}, which has shape {shape}")
            yield start, start + shape[axis]
            start += shape[axis]

    def _single(self, weight: str, piece: Piece, rule: Rule) -> Slot:
        """Return the slot of a weight that is one tensor, or part of one."""
        shape = self._tensors[piece.name].shape
        match [word.split() for word in rule.operations]:
            case [["transpose", "0", "1"]] | [["transpose", "1", "2"]]:
                return Slot(piece.name, transposed=True)
            case [["transpose", *_]]:
                return Slot(piece.name)
            case [["interleave", _]]:
                half = shape[-2] // 2
                return Slot(piece.name, order=tuple(row % 2 * half + row // 2 for row in range(2 * half)))
            case [["chunk", "0"], *rest]:
                height = -(-shape[0] // len(rule.targets))
                part = (piece.target * height, min((piece.target + 1) * height, shape[0]))
                order = self._rotated(rest, rule.targets[piece.target], part[1] - part[0]) if rest else None
                return Slot(piece.name, part=part, order=order)
            case [["split", "0"]]:
                return Slot(piece.name, part=self._attention(piece, shape[0]))
            case [["rope", *words]]:
                return Slot(piece.name, order=self._rotated([["rope", *words]], rule.targets[0], shape[0]))
        raise Refused(f"{weight} is {piece.name} after the operation {', '.join(rule.operations)}: not done yet")

    def _attention(self, piece: Piece, height: int) -> tuple[int, int]:
        """Return the rows of queries, keys or values in one tensor of all three, by the numbers of heads."""
        configs = [self._config, *(value for value in self._config.values() if isinstance(value, Mapping))]
        keys = ("num_attention_heads", "num_key_value_heads")
        heads, few = next((tuple(map(each.get, keys)) for each in configs if all(map(each.get, keys))), (0, 0))
        if not heads or not few or height % (heads + 2 * few):
            raise Refused(f"{piece.name} holds several weights, and the config does not say of which sizes")
        size = height // (heads + 2 * few)
        bounds = (0, heads * size, (heads + few) * size, height)
        return bounds[piece.target], bounds[piece.target + 1]

    def _rotated(self, operations: Sequence[Sequence[str]], name: str, height: int) -> tuple[int, ...] | None:
        """Return the order of rows that rotary embeddings need: pairs on disk, halves in memory."""
        match operations:
            case [["rope", key, names]]:
                inner = self._config.get(key, self._config)
                heads = inner.get("num_attention_heads", 1) if isinstance(inner, Mapping) else 1
                if names != "-" and not any(each in name for each in names.split(",")):
                    return None
                half = height // heads // 2
                places = ((row // (2 * half), row % (2 * half)) for row in range(height))
                return tuple(2 * half * head + row % 2 * half + row // 2 for head, row in places)
        raise Refused(f"{name} is stored after the operation {operations[0][0]}: not done yet")

    def _of_part(self, place: Place, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        """Return the slots of a weight of another layout on disk, which is part of one of the model's or several."""
        assert place.rule
        match place.rule.operations:
            case ("stack", *rest) if not rest or rest == ["concatenate 1"]:
                return (self._expert(place, slots),)
            case ("chunk 0",):
                return tuple(self._all_parts(place))
        raise Refused(f"{place.name} is made with the operation {', '.join(place.rule.operations)}: not done yet")

    def _expert(self, place: Place, slots: tuple[Slot, ...]) -> Slot:
        """Return the slot of one expert's weight in a base that stores all experts as one tensor."""
        assert place.rule
        shape = self._tensors[slots[0].name].shape
        sources, (expert, *others) = len(place.rule.numbers), place.lost or (0, 0)
        whole = len(slots) == 1 and slots[0] == Slot(slots[0].name) and len(shape) == STACKED
        if not whole or others or expert >= shape[0] or shape[1] % sources:
            raise Refused(f"it is part of {place.name}, and the base's {slots[0].name} has shape {shape}")
        height = shape[1] // sources
        start = expert * shape[1] + place.source * height
        return Slot(slots[0].name, part=(start, start + height))

    def _all_parts(self, place: Place) -> Iterator[Slot]:
        """Yield the slots of a weight that the model and the base hold in parts."""
        start = 0
        for weight in _weights(place):
            found = self._weights.get(weight, ())
            if len(found) != 1 or found[0].rule:
                raise Refused(f"it is made of {weight}, which the base does not have as it is")
            name = found[0].name
            height = self._tensors[name].shape[0]
            yield Slot(name, outputs=(start, start + height))
            start += height


def _share(pieces: Sequence[Piece], parts: int) -> list[Piece]:
    """Return one weight's part of the experts, numbered from 0: text experts come first, vision experts second."""
    count = 1 + max((piece.lost[0] for piece in pieces if piece.lost), default=-1)
    size, start = -(-count // parts), pieces[0].target * -(-count // parts)
    mine = (piece for piece in pieces if piece.lost and start <= piece.lost[0] < start + size)
    return [piece._replace(lost=(piece.lost[0] - start,)) for piece in mine]


def _lost(piece: Piece) -> tuple[int, ...]:
    return piece.lost


def _weights(place: Place) -> Iterator[str]:
    """Yield every weight that a stored tensor is part of."""
    yield place.name
    first, *others = place.rule.targets if place.rule else ("",)
    before, _, after = place.name.partition(first) if others else ("", "", "")
    yield from (f"{before}{other}{after}" for other in others)
