"""Names of files: which belong to a model, which are ours, and which stay inside their folder.

Symbolic links are followed only to files of the model, so that no other file is copied into an output.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import Fault, RefError, UnsupportedError

RECORD = "dora_convert"
"""The sub-folder of an output that holds the receipt and the undo record."""
RECEIPT = "receipt.json"
UNDO = "undo.safetensors"
SPOOL = "undo.spool"
JOURNAL = "journal.jsonl"
"""The finished copies and tensors of an unfinished run."""
UPLOADS = "uploads.jsonl"
"""The uploaded files of an unfinished run, in the journal's form."""
CLAIM = "cluster.claim"
"""The name of the run on a cluster that an unfinished output belongs to."""
INCOMING = "incoming"
"""The sub-folder of an unfinished run's record for downloads that do not stay."""
IN_PLACE = ".dora-convert-in-place"
"""The sub-folder of a checkpoint that is being changed in place."""

INDEX_SUFFIX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
GGUF = ".gguf"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
OF_TRAINING = re.compile(r"adapter_|training_args|optimizer|scheduler|rng_state|scaler")
"""Beginnings of file names that end like a model's weights and are not."""
SHARD = re.compile(r".+-\d{5}-of-(?!00001)\d{5}\.\w+$")
"""The name of one shard of several."""

WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".ot", ".tflite", ".mlmodel", ".npz", ".nemo", ".pdparams", ".index.json",
)  # fmt: skip
"""Weights and their indexes: stale beside merged weights, so never copied."""

VOICES = "spk_dict.pt"
"""The voices of Qwen2.5-Omni, without which transformers does not load the model."""

MODEL = re.compile(r"(pytorch_)?model(?![a-z])")
"""Beginnings of the names that a whole model's weight files have."""
WEIGHT_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal", "gguf")
ADAPTER_FILES = "adapter_"
"""The beginning of the names of an adapter's files, which may lie beside a model."""
CARD = "README.md"
NOT_COPIED = (CARD, ".lock")

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model",
)  # fmt: skip
TEMPLATE = ("chat_template*", "additional_chat_templates/*")
PROCESSOR = ("*processor_config.json",)

NOT_FILES = ("/proc", "/sys", "/dev")
"""File systems whose files hold what the kernel says, the user's environment included."""


def is_plain(name: object) -> bool:
    """Return True if a value names a file in the same folder, on any system."""
    if not isinstance(name, str) or not is_text(name) or len(name.encode()) > 255:
        return False
    outside = name in ("", ".", "..") or PurePosixPath(name).name != name
    return not (outside or "\\" in name or "\0" in name)


def is_inside(name: object) -> bool:
    """Return True if a value is a path from a folder to something inside the folder, on any system."""
    return isinstance(name, str) and len(name) < 1000 and all(map(is_plain, name.split("/")))


def is_text(name: str) -> bool:
    """Return True if a name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_weight_file(name: str) -> bool:
    """Return True if a file, named by its path inside the folder, holds weights or an index of weights."""
    path = PurePosixPath(name)
    return path.parts[0] in WEIGHT_FOLDERS or (path.name.endswith(WEIGHT_SUFFIXES) and path.name != VOICES)


def is_beside(name: str) -> bool:
    """Return True if a weight file in an adapter's folder may hold trained weights beside the adapter's own."""
    return "/" not in name and name.endswith((".safetensors", *PICKLES)) and not OF_TRAINING.match(name)


def is_side_file(name: str) -> bool:
    """Return True if a file, named by its path inside the folder, is copied with the model's weights."""
    parts = PurePosixPath(name).parts
    hidden = any(part in (".cache", "__pycache__") or part.startswith(".git") for part in parts)
    adapter = len(parts) == 1 and name.startswith(ADAPTER_FILES)
    return not (hidden or parts[0] == RECORD or adapter or name in NOT_COPIED or is_weight_file(name))


def sort_files(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sort the files beside the weights: side files to copy, and other weights to leave behind."""
    names = list(names)
    visible = [name for name in names if not name.startswith((".", RECORD + "/"))]
    return tuple(filter(is_side_file, names)), tuple(filter(is_weight_file, visible))


def only_entry(entries: Sequence[str], usual: str, where: str) -> str:
    """Return a lone file or index without its `usual` name; raise RefError for several, and for one of several shards.

    Shards without their index may be a part of the model, which a merge would take for all of it.
    """
    if shards := [name for name in entries if SHARD.match(name)]:
        raise RefError(
            f"{where} holds {shards[0]}, and no {usual}.index.json.", hint="download the index and all shards"
        )
    if entries[1:]:
        raise RefError(f"{where} holds several models and no {usual}: {', '.join(entries)}.", hint="name one file")
    return entries[0]


def gguf_model(names: Sequence[str]) -> list[str]:
    """Return the GGUF files of the only model among some files; raise RefError if there are several."""
    files = sorted(name for name in names if name.endswith(GGUF) and not name.startswith("mmproj"))
    models = {_PART.sub("", name): name for name in reversed(files)}
    if len(models) > 1:
        raise RefError(f"Several GGUF models: {', '.join(sorted(models.values()))}.", hint="name one file")
    return gguf_parts(files[0]) if files else []


def gguf_parts(name: str) -> list[str]:
    """Return the names of all GGUF files of a model, from the name of one."""
    if not (match := _PART.search(name)):
        return [name]
    stem, many = name[: match.start()], match[2]
    return [f"{stem}-{number:05d}-of-{many}{GGUF}" for number in range(1, int(many) + 1)]


def is_tokenizer_file(name: str) -> bool:
    """Return True for the tokenizer, processor and chat-template files of an adapter, which a merge takes."""
    return bool(matching([name], (*TOKENIZER, *TEMPLATE, *PROCESSOR)))


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match one of some patterns."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def list_files(root: Path) -> list[str]:
    """Return every file below a folder as a posix path, sorted; symbolic links are followed."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def refuse_links(root: Path, paths: Iterable[Path], *, follow: bool) -> None:
    """Raise UnsupportedError, naming the link, if a file below `root` is a link to a file outside.

    The blobs of a Hub cache belong to its snapshots. With `follow`, a link may lead to any regular file.
    """
    inside, faults, hint = [root.resolve(), *_blobs(root)], [], None
    for path in sorted(paths):
        real = path.resolve()
        if any(folder == real or folder in real.parents for folder in inside):
            continue
        name = path.relative_to(root if root.is_dir() else root.parent).as_posix()
        if not _is_regular(real):
            faults.append(Fault(name, f"is a link to {real}, which is not a regular file"))
        elif not follow:
            faults.append(Fault(name, f"is a link to {real}"))
            hint = f"--follow-links copies them, if you trust the origin of {root.name}"
    if faults:
        raise UnsupportedError(
            f"{root.name} has links to files outside, which are not copied: {faults[0].what}.", faults=faults, hint=hint
        )


def linked_folders(root: Path) -> list[str]:
    """Return the links to folders below a folder; their files are not listed."""
    links = (path for path in root.rglob("*") if path.is_symlink() and path.is_dir())
    return sorted(path.relative_to(root).as_posix() for path in links)


def _blobs(root: Path) -> list[Path]:
    """Return the folder of a cached repo's contents, if `root` is one of the repo's snapshots or lies in one."""
    path = root.absolute()
    repos = [parent.parent.parent for parent in (path, *path.parents) if parent.parent.name == "snapshots"]
    return [(repo / "blobs").resolve() for repo in repos if "--" in repo.name]


def _is_regular(path: Path) -> bool:
    try:
        kernel = {Path(folder).stat().st_dev for folder in NOT_FILES if Path(folder).is_dir()}
        return stat.S_ISREG(path.stat().st_mode) and path.stat().st_dev not in kernel
    except OSError:
        return False


class FileState(NamedTuple):
    """The numbers that a file system gives a file, from which a change of the contents shows."""

    inode: int
    size: int
    mtime: int
    ctime: int
    attributes: list[int]
    """Mode, owner, group and number of names: a change of these alone also sets `ctime`."""
    device: int = 0
    """Left out of journals: a disk may get another number when it is mounted again."""


FileStates = Mapping[Path, FileState]
"""Files of one input, as they were before the first of them was read."""


def file_states(paths: Iterable[Path]) -> dict[Path, FileState]:
    """Return the states of files; a file that cannot be examined is left to its reader."""
    states = {path: _state(path) for path in paths}
    return {path: state for path, state in states.items() if state}


def _state(path: Path) -> FileState | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return FileState(
        inode=stat.st_ino,
        size=stat.st_size,
        mtime=stat.st_mtime_ns,
        ctime=stat.st_ctime_ns,
        attributes=[stat.st_mode, stat.st_uid, stat.st_gid, stat.st_nlink],
        device=stat.st_dev,
    )


def change(before: FileState, after: FileState | None) -> str | None:
    """Return how a file's contents have changed, as the end of "the file was …"; None if they have not."""
    if after is None:
        return "removed"
    if (before.device, before.inode) != (after.device, after.inode):
        return "replaced"
    if (before.size, before.mtime) != (after.size, after.mtime):
        return "rewritten"
    # a time that was set back leaves a new ctime; chmod and a hard link do so, too, and show in the attributes
    touched = before.ctime != after.ctime and before.attributes == after.attributes
    return "rewritten, and its time was set back" if touched else None


def refuse_changed(*inputs: FileStates) -> None:
    """Raise RefError, naming the file, if an input's files are not as they were before they were read."""
    for path, before in ((path, state) for states in inputs for path, state in states.items()):
        if how := change(before, _state(path)):
            raise RefError(
                f"{path} changed while it was read: the file was {how}.",
                hint="rerun the same command when nothing else writes there",
            )


def journal_lines(states: FileStates) -> list[list[object]]:
    """Return states as JSON values for a journal's key."""
    return [[str(path.resolve()), *state[:5]] for path, state in states.items()]


def same_lines(earlier: object, lines: list[list[object]]) -> bool:
    """Return True if lines of an earlier journal are of files with the same contents."""
    if not isinstance(earlier, list) or len(earlier) != len(lines):
        return False
    return all(old == new or _same_file(old, new) for old, new in zip(earlier, lines, strict=True))


def _same_file(old: object, new: list[object]) -> bool:
    """Return True for the same path, if nothing but the attributes has changed."""
    if not isinstance(old, list) or not len(old) == len(new) == len(FileState._fields) or old[0] != new[0]:
        return False
    return change(FileState(*old[1:]), FileState(*new[1:])) is None  # type: ignore[arg-type]


WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names."""


def unwrapped(name: str) -> str:
    """Return a name without the names that training programs put into it."""
    if "module" not in name and "_orig_mod" not in name:  # nearly all names: a look costs less than to take apart
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
