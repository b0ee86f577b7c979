"""A folder as it would be uploaded: which of its files, and whether it is what it says it is.

Only whole things are uploaded: a checkpoint all of whose shards are there and in order, or an adapter. Where a receipt
lies beside the weights, they must be those that it speaks of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..adapters.adapter import Adapter
from ..errors import Fault, MalformedError, RefError, VerificationError
from ..formats.detect import detect, is_adapter_file
from ..output.folder import LOCK
from ..output.receipt import Receipt, read_receipt
from ..sources.inputs import read_or_refuse
from ..storage.checkpoint import open_checkpoint
from ..storage.filenames import JOURNAL, RECEIPT, RECORD, is_weight_file, list_files
from ..storage.reader import Reader
from ..storage.refs import Source, local_path, local_source
from ..storage.safetensors import StoredTensor

NOTED = f"{RECORD}/{RECEIPT}"
HASHERS = 2


@dataclass(frozen=True)
class FolderContents:
    """What of a folder goes up, and what is known of it."""

    source: Source
    adapter: Adapter | None
    """What is known of an adapter; None for a checkpoint."""
    names: tuple[str, ...]
    """Paths inside the folder, sorted."""
    left_behind: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    receipt: Receipt | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """The files that hold tensors or say where they are."""
        return tuple(name for name in self.names if is_weight_file(name) and "/" not in name)

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.source.path / name


def pack(folder: str) -> FolderContents:
    """Look at a folder that is to be uploaded.

    Raises RefError, MalformedError and their siblings for what is no model, or only part of one.
    """
    path = local_path(folder, "DIR")
    if not path.is_dir():
        what = "is a file; name the folder it lies in" if path.exists() else "does not exist"
        raise RefError(f"DIR {folder!r} {what}.", hint="dora-convert push DIR REPO_ID")
    _refuse_unfinished(path)
    source = local_source(path)
    files = [name for name in list_files(path) if not _is_hidden(name)]
    if detect(path):
        return _adapter(source, files)
    return _checkpoint(source, files)


def _refuse_unfinished(path: Path) -> None:
    if (path / LOCK).exists() or (path / RECORD / JOURNAL).exists():
        raise RefError(
            f"DIR {path} is an unfinished output.",
            hint="the command that began it continues it; push it then",
        )


def _is_hidden(name: str) -> bool:
    """Whether a file belongs to git, a cache or an editor, not to a model."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__pycache__" for part in parts)


def _checkpoint(source: Source, files: Sequence[str]) -> FolderContents:
    opened = open_checkpoint(source)
    weights = {shard.filename for shard in opened.shards} | {opened.index_name or ""}
    names = [name for name in files if name in weights or _in_record(name) or not is_weight_file(name)]
    return _parcel(source, None, names, files, opened.tensors)


def _adapter(source: Source, files: Sequence[str]) -> FolderContents:
    adapter, _ = read_or_refuse(source, ())
    if adapter.faults:
        raise MalformedError(f"The adapter {source.name} contradicts itself.", faults=adapter.faults)
    names = [name for name in files if _of_adapter(name)]
    return _parcel(source, adapter, names, files, adapter.tensors)


def _of_adapter(name: str) -> bool:
    """Whether a file of an adapter's folder is part of it, and not of the training that left it there."""
    return (
        is_adapter_file(name)
        or _in_record(name)
        or not (is_weight_file(name) or name.startswith("checkpoint-"))
    )


def _in_record(name: str) -> bool:
    return name.startswith(f"{RECORD}/")


def _parcel(
    source: Source,
    adapter: Adapter | None,
    names: Sequence[str],
    files: Sequence[str],
    tensors: Mapping[str, StoredTensor],
) -> FolderContents:
    receipt = read_receipt(source.path / RECORD) if NOTED in names else None
    left = sorted(set(files) - set(names))
    return FolderContents(source, adapter, tuple(sorted(names)), tuple(left), tensors, receipt)


def check_receipt(contents: FolderContents) -> int:
    """Compare the tensors that the receipt has hashes of with the files; how many there were.

    Raises VerificationError naming all that are others.
    """
    written = _hashes(contents.receipt) if contents.receipt else {}
    with closing(Reader()) as reader, ThreadPoolExecutor(HASHERS) as pool:
        known = [contents.tensors[name] for name in written if name in contents.tensors]
        digests = pool.map(reader.digest, known)
        found = {tensor.name: digest.fast for tensor, digest in zip(known, digests, strict=True)}
    faults = [
        Fault(name, "is not what was written" if name in found else "is missing")
        for name, expected in written.items()
        if found.get(name) != expected
    ]
    if faults:
        raise VerificationError(
            f"{contents.source.name} is not what its receipt says: {len(faults)} tensors differ.",
            faults=faults,
            hint=f"make it again; if it was changed on purpose, remove {NOTED}",
        )
    return len(found)


def _hashes(receipt: Receipt) -> dict[str, str]:
    """Return the hash of each tensor that a receipt has the hash of, as it was written."""
    made = {name: entry.written for name, entry in receipt.tensors.items() if entry.written}
    return {**made, **receipt.copied}
