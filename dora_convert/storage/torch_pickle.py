"""Locate the tensors in files that torch.save wrote (`.bin`, `.pt`, `.pth`), without unpickling anything.

Two formats, both PyTorch's own, for a dict of names and tensors:

* since torch 1.6 a zip archive of stored records in one folder: `data.pkl` is the dict, `byteorder` says
  little or big, and `data/KEY` holds the bytes of one storage;
* before, five pickles in a row (magic number, version, facts about the machine, the dict, the storages'
  keys), then for each key the storage's number of elements as an int64, and its bytes.

In both, a tensor is a call: rebuild it from a storage, an offset, a shape and strides, all counted in
elements. Python's own unpickler is not used, not even restricted: it crashes on deeply nested keys, allocates
for whatever index a memo is given, and lets the last of two equal keys win. `_Machine` knows the opcodes that
a dict of tensors needs.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NamedTuple

from ..errors import DoraConvertError, MalformedError, UnsupportedError, shown
from .bounded_file import BoundedFile
from .safetensors import BITS, MAX_DIMENSIONS, Header, StoredTensor, open_file
from .strict_header import are_counts

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAX_PICKLE = 32_000_000
"""Bytes, enough for 150,000 tensors; a hostile pickle takes up to 70 times as much memory."""

MAX_STEPS, MAX_TUPLES, MAX_STACK = 6_000_000, 1_000_000, 1_000_000
"""Opcodes of one pickle (40 for each of so many tensors), its tuples (6), and values that wait to be put together."""

AGAIN = "It may be truncated; download it again."
INSTEAD = "A pickle can run code, so nothing but tensors is read from one; get the model as safetensors."
BIG_ENDIAN = "was saved on a big-endian machine; convert it there."

_DAMAGE = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, EOFError, MemoryError, Warning,
           struct.error, zipfile.BadZipFile)  # fmt: skip
"""Errors that zipfile, struct, pickletools, and calls with the wrong arguments raise for a broken file."""


class _Dtype(NamedTuple):
    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int
    nbytes: int


class _Tensor(NamedTuple):
    """The arguments of torch's `_rebuild_tensor_v2`, and a dtype; checked when the tensor's name is known."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    requires_grad: Any = None
    hooks: Any = None
    view: Any = None
    dtype: Any = None


_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64", "bool": "BOOL",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16",
    "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "DoubleStorage": "F64", "FloatStorage": "F32",
    "HalfStorage": "F16", "BFloat16Storage": "BF16", "ComplexFloatStorage": "C64", "BoolStorage": "BOOL",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "UntypedStorage": "U8",
}  # fmt: skip
"""torch's dtypes, and its storages from the time when each dtype had its own."""

_GLOBALS: dict[str, Any] = {
    "collections OrderedDict": lambda: {},  # noqa: PIE807 -- dict would take arguments, and hash them
    "torch._utils _rebuild_tensor": _Tensor,
    "torch._utils _rebuild_tensor_v2": _Tensor,
    "torch._utils _rebuild_tensor_v3":
        lambda a, b, c, d, e, f, dtype, g=None: _Tensor(a, b, c, d, e, hooks=f, view=g, dtype=dtype),
    "torch._utils _rebuild_parameter": lambda data, _grad, _hooks: data,
    "torch._utils _rebuild_parameter_with_state": lambda data, _grad, _hooks, _state: data,
    "torch.storage UntypedStorage": _Dtype("U8"),
    **{f"torch {name}": _Dtype(dtype) for name, dtype in _DTYPES.items()},
}  # fmt: skip
"""All that a pickle may name, and its stand-ins; no other value can be called."""


class _Machine:
    """Runs one pickle on plain values; opcodes and globals outside `_OPCODES` and `_GLOBALS` are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.numbered: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, file: IO[bytes]) -> Any:
        """Return the pickle's value and stop behind it; genops believes any length, so reads are bounded."""
        read, line = lambda count: file.read(min(count, MAX_PICKLE)), lambda: file.readline(MAX_PICKLE)
        head: Any = SimpleNamespace(read=read, readline=line, tell=file.tell)
        tuples = 0
        for step, (opcode, argument, position) in enumerate(pickletools.genops(head)):
            if position is None or position > MAX_PICKLE:
                raise MalformedError(f"{self.path}: more than {MAX_PICKLE} bytes of pickle are not read.")
            tuples += opcode.name.startswith("TUPLE")
            if step > MAX_STEPS or tuples > MAX_TUPLES or len(self.stack) + len(self.marks) > MAX_STACK:
                raise MalformedError(f"{self.path}: its pickle makes more values than 150,000 tensors need.")
            if opcode.name not in _OPCODES:
                raise MalformedError(f"{self.path}: pickle opcode {opcode.name} is refused.", hint=INSTEAD)
            _OPCODES[opcode.name](self, argument)
        [value] = self.stack + self.marks  # nothing else may be left
        return value

    def last(self, count: int) -> list[Any]:
        """Pop the last `count` values off the stack."""
        return [self.stack.pop() for _ in range(count)][::-1]

    def group(self) -> list[Any]:
        """Pop everything since the last mark off the stack."""
        return self.last(len(self.stack) - self.marks.pop())

    def update(self, pairs: Sequence[Any]) -> None:
        """Put keys and values, in turn, into the dict on top of the stack."""
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in {str, int}:  # a tuple, nested deeply enough, crashes Python when it is hashed
                raise UnsupportedError(f"{self.path}: a {_kind(key)} as a key is refused.", hint=INSTEAD)
            if key in self.stack[-1]:
                raise MalformedError(f"{self.path}: {shown(key)} occurs twice.")
            dict.__setitem__(self.stack[-1], key, value)

    def find(self, name: str) -> None:
        """Push the stand-in of a global; raise MalformedError for a global that is not allowed."""
        if name not in _GLOBALS:
            raise MalformedError(f"{self.path} asks for {shown(name.replace(' ', '.'))}.", hint=INSTEAD)
        self.stack.append(_GLOBALS[name])

    def storage(self) -> None:
        """Push a storage from its dtype, key, device and number of elements; old files add None."""
        kind, dtype, key, _device, numel, *view = self.stack.pop()
        fits = type(key) is str and isinstance(dtype, _Dtype) and are_counts((numel,), tuple)
        if kind != "storage" or not fits or view not in ([], [None]):
            raise TypeError("not a storage")
        storage = _Storage(dtype.name, key, numel, numel * BITS[dtype.name] // 8)
        if self.storages.setdefault(key, storage) != storage:
            raise MalformedError(f"{self.path} describes its storage {shown(key)} in two ways.")
        self.stack.append(storage)


_VALUES = ("NONE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")

_OPCODES: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _m, _: None),
    **dict.fromkeys(_VALUES, lambda m, value: m.stack.append(value)),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.group())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.last(3))),
    "SETITEM": lambda m, _: m.update(m.last(2)),
    "SETITEMS": lambda m, _: m.update(m.group()),
    "APPEND": lambda m, _: list.append(m.stack[-2], m.stack.pop()),
    "APPENDS": lambda m, _: list.extend(m.stack[m.marks[-1] - 1], m.group()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, index: m.numbered.update({index: m.stack[-1]})),
    "MEMOIZE": lambda m, _: m.numbered.update({len(m.numbered): m.stack[-1]}),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.stack.append(m.numbered[index])),
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": lambda m, _: m.find(" ".join(m.last(2))),
    "REDUCE": lambda m, _: m.stack.append(m.stack.pop(-2)(*m.stack.pop())),
    "BINPERSID": lambda m, _: m.storage(),
    "BUILD": lambda m, _: m.stack.pop(),  # attributes, such as `_metadata` of an OrderedDict: dropped
}


def read_pickle(path: Path, within: Sequence[str] = ()) -> Header:
    """Locate the tensors of one file; several may share bytes, and gaps lie between them.

    The dict may lie under a key in `within`. Raises MalformedError or UnsupportedError for all but a flat dict of
    names and contiguous tensors.
    """
    try:
        with open_file(path) as file:
            tree, starts = _read(path, path.stat().st_size, file)
        tree = next((tree[key] for key in within if type(tree) is dict and type(tree.get(key)) is dict), tree)
        tensors = [_stored(path, name, value, starts) for name, value in _entries(path, tree).items()]
    except DoraConvertError:
        raise
    except _DAMAGE as error:
        raise MalformedError(f"{path} is damaged, or torch.save did not write it.", hint=AGAIN) from error
    return Header({tensor.name: tensor for tensor in sorted(tensors, key=lambda it: (it.start, it.nbytes))}, {})


def _read(path: Path, size: int, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    """Return the pickled value, and the first byte of each of its storages."""
    head = file.read(24)
    file.seek(0)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_zip(path, file) if head.startswith(b"PK") else _read_legacy(path, size, file)
    hint = "It is a safetensors file: rename it to .safetensors." if head[8:9] == b"{" else AGAIN
    raise MalformedError(f"{path} ({size} bytes) is not a file that torch.save wrote.", hint=hint)


def _read_zip(path: Path, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    with BoundedFile(path, MAX_PICKLE) as bounded, zipfile.ZipFile(bounded) as archive:
        names = archive.namelist()
        roots = [name[:-8] for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1 or len(set(names)) != len(names):
            raise MalformedError(f"{path} is a zip archive, but not one that torch.save wrote.")
        ranges = {info.filename: _range(path, file, archive, info) for info in archive.infolist()}
        if f"{roots[0]}byteorder" in ranges and archive.open(f"{roots[0]}byteorder").read(8) != b"little":
            raise UnsupportedError(f"{path} {BIG_ENDIAN}")
        with archive.open(f"{roots[0]}data.pkl") as record:
            tree, starts = (machine := _Machine(path)).run(record), {}
    for key, storage in machine.storages.items():
        starts[key], length = ranges.get(f"{roots[0]}data/{key}", (0, -1))
        if length < storage.nbytes:
            raise MalformedError(f"{path}: storage {shown(key)} is missing or too short.", hint=AGAIN)
    return tree, starts


def _range(path: Path, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return the first byte of a record's content, and the number of its bytes."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise UnsupportedError(f"{path}: its record {shown(info.filename)} is compressed.")
    archive.open(info).close()  # raises unless the record's own header bears its name
    file.seek(info.header_offset + 26)
    start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    if start + info.file_size > archive.start_dir:
        raise MalformedError(f"{path} ends before its record {shown(info.filename)} does.", hint=AGAIN)
    return start, info.file_size


def _read_legacy(path: Path, size: int, file: IO[bytes]) -> tuple[Any, dict[str, int]]:
    if _Machine(path).run(file) != MAGIC or _Machine(path).run(file) != PROTOCOL:
        raise MalformedError(f"{path} is a pickle, but not one that torch.save wrote.")
    if dict.get(_Machine(path).run(file), "little_endian") is not True:
        raise UnsupportedError(f"{path} {BIG_ENDIAN}")
    tree, keys, starts = (machine := _Machine(path)).run(file), _Machine(path).run(file), {}
    if sorted(keys) != sorted(machine.storages):
        raise MalformedError(f"{path} lists other storages than its tensors use.")
    for key in keys:
        if file.read(8) != machine.storages[key].numel.to_bytes(8, "little"):
            raise MalformedError(f"{path}: storage {shown(key)} is missing or too short.", hint=AGAIN)
        starts[key] = file.tell()
        file.seek(machine.storages[key].nbytes, io.SEEK_CUR)
    if file.tell() != size:
        raise MalformedError(f"{path} is {size} bytes long, its storages end at {file.tell()}.", hint=AGAIN)
    return tree, starts


def _entries(path: Path, tree: Any) -> dict[str, _Tensor]:
    if type(tree) is not dict or not all(type(name) is str for name in tree):
        raise UnsupportedError(f"{path} does not hold a dict of names and tensors.")
    for name, value in tree.items():
        if type(value) is dict and any(isinstance(item, _Tensor) for item in value.values()):
            hint = f"Load it where you trust it, and save what is under {shown(name)} on its own."
            raise UnsupportedError(f"{path} keeps its tensors under the key {shown(name)}.", hint=hint)
    if odd := next((name for name, value in tree.items() if not isinstance(value, _Tensor)), None):
        raise UnsupportedError(f"{path}: {shown(odd)} is not a tensor ({_kind(tree[odd])}).")
    return tree


def _stored(path: Path, name: str, tensor: _Tensor, starts: Mapping[str, int]) -> StoredTensor:
    storage, offset, shape, stride, *_, view, dtype = tensor
    counts = (
        all(are_counts(each, tuple) for each in ((offset,), shape, stride))
        and len(shape) == len(stride) <= MAX_DIMENSIONS
    )
    if not counts or not isinstance(storage, _Storage) or not isinstance(dtype, _Dtype | None):
        raise MalformedError(f"{path}: {shown(name)} is not described as a tensor should be.")
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    contiguous = 0 in shape or all(n == 1 or a == b for n, a, b in zip(shape, stride, steps, strict=True))
    if view or not contiguous:
        what, hint = f"{path}: {shown(name)}", "Save it again with .resolve_conj().resolve_neg().contiguous()."
        raise UnsupportedError(f"{what} is a transposed, strided or lazy view.", hint=hint)
    kind = dtype.name if dtype else storage.dtype
    first = 0 if 0 in shape else offset * BITS[kind] // 8
    stored = StoredTensor(name, kind, shape, path, starts[storage.key] + first)
    if first + stored.nbytes > storage.nbytes:
        raise MalformedError(f"{path}: {shown(name)} is larger than its storage.")
    return stored


def _kind(value: object) -> str:
    return type(value).__name__.strip("_").lower()
