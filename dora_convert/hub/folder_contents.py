"""Read a folder before it is uploaded: choose its files, and check them against the receipt beside them.

Only complete folders are accepted: a checkpoint with all its shards, or an adapter.
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
from ..storage.refs import Source, local_path, local_source, refuse_unfinished
from ..storage.safetensors import StoredTensor

RECEIPT_PATH = f"{RECORD}/{RECEIPT}"
HASHERS = 2


@dataclass(frozen=True)
class FolderContents:
    """The files of a folder that are uploaded, and the headers and receipt read from them."""

    source: Source
    adapter: Adapter | None
    """None for a checkpoint."""
    names: tuple[str, ...]
    """Paths of the uploaded files inside the folder, sorted."""
    left_behind: tuple[str, ...]
    """Paths of the other files, sorted."""
    tensors: Mapping[str, StoredTensor]
    receipt: Receipt | None = None

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self.source.path / name


def read_folder(folder: str) -> FolderContents:
    """Read the headers and the receipt of a folder that is to be uploaded.

    Raises RefError, MalformedError or another DoraConvertError if the folder is not a complete model.
    """
    path = local_path(folder, "DIR")
    if not path.is_dir():
        refuse_unfinished(path, f"DIR {folder!r}")
        what = "is a file; name the folder it lies in" if path.exists() else "does not exist"
        raise RefError(f"DIR {folder!r} {what}.", hint="dora-convert push DIR REPO_ID")
    _refuse_unfinished(path)
    source = local_source(path)
    _refuse_links(path)
    files = [name for name in list_files(path) if not _is_hidden(name)]
    if detect(path):
        return _adapter_contents(source, files)
    return _checkpoint_contents(source, files)


def _refuse_unfinished(path: Path) -> None:
    if (path / LOCK).exists() or (path / RECORD / JOURNAL).exists():
        raise RefError(f"DIR {path} is an unfinished output.", hint="rerun the command that began it, then push")


def _refuse_links(path: Path) -> None:
    """Raise RefError for a folder with links: only files that lie in the folder are uploaded."""
    links = (entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_symlink())
    if faults := [Fault(name, "is a link") for name in sorted(links) if not _is_hidden(name)]:
        raise RefError(
            f"DIR {path} holds links, which are not uploaded: {faults[0].what}.",
            faults=faults,
            hint="put copies of the files in their place",
        )


def _is_hidden(name: str) -> bool:
    """Return True for files of git, of a cache or of an editor."""
    parts = PurePosixPath(name).parts
    return any(part.startswith(".") or part == "__pycache__" for part in parts)


def _checkpoint_contents(source: Source, files: Sequence[str]) -> FolderContents:
    opened = open_checkpoint(source)
    weights = {shard.filename for shard in opened.shards} | {opened.index_name or ""}
    names = [name for name in files if name in weights or _in_record(name) or not is_weight_file(name)]
    return _contents(source, None, names, files, opened.tensors)


def _adapter_contents(source: Source, files: Sequence[str]) -> FolderContents:
    adapter, _ = read_or_refuse(source, ())
    if adapter.faults:
        raise MalformedError(f"The adapter {source.name} contradicts itself.", faults=adapter.faults)
    names = [name for name in files if _is_of_adapter(name)]
    return _contents(source, adapter, names, files, adapter.tensors)


def _is_of_adapter(name: str) -> bool:
    """Return True if a file belongs to the adapter, and not to the training that wrote it."""
    of_training = is_weight_file(name) or name.startswith("checkpoint-")
    return is_adapter_file(name) or _in_record(name) or not of_training


def _in_record(name: str) -> bool:
    return name.startswith(f"{RECORD}/")


def _contents(
    source: Source,
    adapter: Adapter | None,
    names: Sequence[str],
    files: Sequence[str],
    tensors: Mapping[str, StoredTensor],
) -> FolderContents:
    receipt = read_receipt(source.path / RECORD) if RECEIPT_PATH in names else None
    left_behind = tuple(sorted(set(files) - set(names)))
    return FolderContents(source, adapter, tuple(sorted(names)), left_behind, tensors, receipt=receipt)


def check_receipt(contents: FolderContents) -> int:
    """Compare every tensor that the receipt has a hash of, and return the number of tensors compared.

    Raises VerificationError with the names of all tensors that differ.
    """
    written = _hashes(contents.receipt) if contents.receipt else {}
    with closing(Reader()) as reader, ThreadPoolExecutor(HASHERS) as pool:
        tensors = [contents.tensors[name] for name in written if name in contents.tensors]
        digests = pool.map(reader.digest, tensors)
        hashes = {tensor.name: digest.fast for tensor, digest in zip(tensors, digests, strict=True)}
    faults = [
        Fault(name, "differs from what was written" if name in hashes else "is missing")
        for name, expected in written.items()
        if hashes.get(name) != expected
    ]
    if faults:
        raise VerificationError(
            f"{contents.source.name} does not match its receipt: {len(faults)} tensors differ.",
            faults=faults,
            hint=f"write it again; if it was changed on purpose, remove {RECEIPT_PATH}",
        )
    return len(hashes)


def _hashes(receipt: Receipt) -> dict[str, str]:
    """Return the hash of each written or copied tensor of a receipt, by name."""
    written = {name: entry.written for name, entry in receipt.tensors.items() if entry.written}
    return {**written, **receipt.copied}
