"""Read a folder before it is uploaded: choose its files, and check them against the receipt beside them.

Only complete folders are accepted: a checkpoint with all its shards, or an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..adapters import NOTHING, Adapter
from ..errors import Fault, MalformedError, RefError, VerificationError
from ..formats.detect import detect, is_adapter_file
from ..output.folder import LOCK
from ..output.receipt import Receipt, read_receipt
from ..sources.inputs import read_or_refuse
from ..storage.checkpoint import open_checkpoint
from ..storage.filenames import JOURNAL, RECEIPT, RECORD, UNDO, is_weight_file, list_files
from ..storage.reader import Reader, sha256
from ..storage.refs import Source, is_address, local_path, local_source, refuse_unfinished
from ..storage.safetensors import StoredTensor, read_header
from ..storage.spool import damaged_tensors

HASHERS = 2


@dataclass(frozen=True)
class FolderContents:
    """The files of a folder that are uploaded, and the headers and receipt read from them."""

    source: Source
    adapter: Adapter | None
    """None for a checkpoint."""
    sizes: Mapping[str, int]
    """The size of each uploaded file, by its path inside the folder, sorted."""
    left_behind: tuple[str, ...]
    """Paths of the other files, sorted."""
    tensors: Mapping[str, StoredTensor]
    receipt: Receipt | None


def read_folder(folder: str) -> FolderContents:
    """Read the headers and the receipt of a folder that is to be uploaded.

    Raises RefError, MalformedError or another DoraConvertError if the folder is not a complete model.
    """
    path = folder_path(folder)
    if (path / LOCK).exists() or (path / RECORD / JOURNAL).exists():
        raise RefError(f"DIR {path} is an unfinished output.", hint="rerun the command that began it, then push")
    source = local_source(path)
    adapter, tensors, weights = _read_model(source)
    files = [name for name in list_files(path) if not _is_hidden(name)]
    names = [name for name in files if name in weights or _is_beside(name, adapter)]
    _refuse_links(path, names)
    return FolderContents(
        source=source,
        adapter=adapter,
        sizes={name: (path / name).stat().st_size for name in names},
        left_behind=tuple(sorted(set(files) - set(names))),
        tensors=tensors,
        receipt=read_receipt(path / RECORD),
    )


def folder_path(folder: str) -> Path:
    """Return the path of a folder that is to be uploaded; RefError if it is not a folder."""
    path = local_path(folder, "DIR")
    if not path.is_dir():
        refuse_unfinished(path, "DIR")
        missing = "is an address, not a folder on this machine" if is_address(folder) else "does not exist"
        what = "is a file; name the folder it lies in" if path.exists() else missing
        raise RefError(f"DIR {folder!r} {what}.", hint="dora-convert push DIR REPO_ID")
    return path


def _read_model(source: Source) -> tuple[Adapter | None, Mapping[str, StoredTensor], set[str | None]]:
    """Read the headers of an adapter or a checkpoint; return its tensors and the names of a checkpoint's files."""
    if not detect(source.path):
        opened = open_checkpoint(source)
        return None, opened.tensors, {*(shard.filename for shard in opened.shards), opened.index_name}
    adapter, _ = read_or_refuse(source, NOTHING)
    if adapter.faults:
        raise MalformedError(f"The adapter {source.name} contradicts itself.", faults=adapter.faults)
    return adapter, adapter.tensors, set()


def _refuse_links(folder: Path, names: Sequence[str]) -> None:
    """Refuse links that lead out of the folder; the Hub's cache links a repo's files to its own `blobs`."""
    root = folder.resolve()
    inside = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    targets = {name: (folder / name).resolve() for name in names}
    faults = [
        Fault(name, f"is a link to {target}")
        for name, target in targets.items()
        if not any(target.is_relative_to(known) for known in inside)
    ]
    if faults:
        raise RefError(
            f"{folder} holds links to files outside it; push uploads no such link.",
            faults=faults,
            hint="put the file itself in the place of each link",
        )


def _is_hidden(name: str) -> bool:
    """Return True for files of git, of a cache or of an editor."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def _is_beside(name: str, adapter: Adapter | None) -> bool:
    """Return True if a file belongs to the model beside its weights, and not to the training that wrote it."""
    own = {path.name for path in adapter.files} if adapter else set()
    if name.startswith(f"{RECORD}/") or name in own or (adapter and is_adapter_file(name)):
        return True
    return not (is_weight_file(name) or (adapter and name.startswith("checkpoint-")))


def edited_files(contents: FolderContents) -> list[str]:
    """Return the files beside the weights that a merge copied from its base, and that differ by now."""
    if not (receipt := contents.receipt):
        return []
    copied = {name: proof for name, proof in receipt.base_files.items() if receipt.side_files.get(name) == "copied"}
    return [
        name
        for name, proof in copied.items()
        if proof and (name not in contents.sizes or proof != sha256(contents.source.path / name))
    ]


def check_receipt(contents: FolderContents) -> int:
    """Compare every tensor that the receipt has a hash of, and return the number of tensors compared.

    Raises VerificationError with the names of all tensors that differ, those of the undo record included.
    """
    written: dict[str, str] = {}
    if receipt := contents.receipt:
        written = {name: entry.written for name, entry in receipt.tensors.items() if entry.written}
        written.update(receipt.copied)
    with closing(Reader()) as reader, ThreadPoolExecutor(HASHERS) as pool:
        tensors = [contents.tensors[name] for name in written if name in contents.tensors]
        digests = pool.map(reader.digest, tensors)
        hashes = {tensor.name: digest.fast for tensor, digest in zip(tensors, digests, strict=True)}
        record = contents.source.path / RECORD / UNDO
        undo = read_header(record).tensors if record.is_file() else {}
        damaged = damaged_tensors(receipt.undo_record, undo, reader) if receipt else []
    faults = [
        Fault(name, "differs from what was written" if name in hashes else "is missing")
        for name, expected in written.items()
        if hashes.get(name) != expected
    ]
    faults += [Fault(f"{UNDO}: {name}", why) for name, why in damaged]
    if faults:
        raise VerificationError(
            f"{contents.source.name} does not match its receipt: {len(faults)} tensors differ.",
            faults=faults,
            hint=f"write it again; if it was changed on purpose, remove {RECORD}/{RECEIPT}",
        )
    return len(hashes)
