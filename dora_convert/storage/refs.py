"""Parse a REF, the one syntax for inputs: BASE, ADAPTER and MERGED on the command line.

./folder                              a local directory; a local path wins over a repo id
org/name, org/name@revision           a repo on the Hugging Face Hub
https://huggingface.co/org/name       the address of the repo's page, /tree/revision too
hf://org/name[@revision][/subfolder]  the same, never a local path
s3://bucket/folder, gs://…, az://…    a folder in an object store, for merge and other verbs that read whole inputs
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import DoraConvertError, OutputError, RefError, noted, together

PathLike = str | os.PathLike[str]

STORES = ("s3", "gs", "az")
"""Object stores, by the beginnings of their addresses; the extras have the same names."""
HUB = "hf://"
"""The beginning of an address on the Hub."""
_ADDRESS = re.compile(
    r"(?i)(?P<scheme>(?:hf|https?|ftp|file|memory|s3[an]?|gc?s|az|abfss?|adl|wasbs?|hdfs|dbfs)(?=:/)"
    r"|[a-z][\w+.-]+(?=://)):/+"
)
"""The beginning of an address of any kind; a Path has lost one of the slashes of those that are known."""
_SAME_STORE = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
"""Other tools' beginnings of addresses in object stores, and the ones that are read here."""
_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/\s]+(?:/[^/\s]+)*?))?")
QUANTISED_NAME = re.compile(r"(?i)[-_.](unsloth-)?(bnb|gptq|awq|gguf|[48]-?bits?|int[48]|fp8|nf4)\b.*$")
"""The end of the name of a quantised copy."""
_HF_URI = re.compile(r"hf://(?:models/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<subfolder>\S+))?")


@dataclass(frozen=True)
class HubRef:
    """A repo on the Hub, perhaps at a revision, perhaps a folder inside it."""

    repo: str
    revision: str | None = None
    subfolder: str = ""

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{at}{'/' + self.subfolder if self.subfolder else ''}"

    @property
    def file(self) -> str:
        """The name of a single weight file, if the subfolder is one; else empty."""
        name = self.subfolder.rpartition("/")[2]
        return name if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")) else ""

    @property
    def around(self) -> HubRef:
        """The folder that holds the file."""
        return replace(self, subfolder=self.subfolder.rpartition("/")[0]) if self.file else self

    def in_repo(self, name: str) -> str:
        """Return the path in the repo of a file in the folder."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


@dataclass(frozen=True)
class Source:
    """A REF on this machine: the folder, its name for people, and for a Hub repo its id and commit."""

    path: Path
    name: str
    repo: str | None = None
    commit: str | None = None
    subfolder: str = ""
    url: str | None = None
    """The address in an object store."""

    @property
    def hub(self) -> HubRef:
        """The repo at its commit."""
        return HubRef(str(self.repo), self.commit, self.subfolder)

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of a receipt."""
        return {"name": self.name, "repo": self.repo, "commit": self.commit}

    @property
    def title(self) -> str:
        """The name in receipts and cards, as a REF: never a path."""
        if not self.repo:
            return self.name
        return f"{'hf://' if self.subfolder else ''}{self.hub}"

    @property
    def address(self) -> str:
        """The repo at its commit, the address in an object store, or the local path."""
        return self.title if self.repo else self.url or str(self.path)


def parse_ref(ref: str, what: str = "REF") -> Path | HubRef:
    """Return a REF as an existing local path or a Hub repo; raise RefError if it is neither."""
    if match := _HF_URI.fullmatch(ref):
        return HubRef(match["repo"], match["revision"], (match["subfolder"] or "").strip("/"))
    path = local_path(ref, what)
    if path.is_dir() or path.is_file():
        return path
    if path.exists() or path.is_symlink():
        kind = "not a folder or a file" if path.exists() else "a link to a path that does not exist"
        raise RefError(f"{what} {ref!r} is {kind}.")

    if address := read_address(ref, what):
        return HubRef(*address)
    if ref.endswith("@") or ref.count("@") > 1:
        raise RefError(f"{what} {ref!r} names no revision, or several.", hint="a Hub repo is written org/name@revision")
    refuse_unfinished(path, what)
    if (match := _REPO.fullmatch(ref)) and not ref.startswith((".", "~")):
        return HubRef(match["repo"], match["revision"])
    slashes = ref.replace("\\", "/")
    meant = f"did you mean {slashes}?" if slashes != ref and _REPO.fullmatch(slashes) else _similar(path)
    raise RefError(f"{what} {ref!r} does not exist.", hint=meant or "a Hub repo is written org/name")


def refuse_missing(*named: tuple[str, PathLike | None]) -> None:
    """Raise RefError for all REFs that are neither on this machine nor addresses; each comes with its word."""
    errors = list[tuple[str, DoraConvertError]]()
    for what, ref in named:
        if ref is None or is_stored(ref):
            continue
        with noted(errors, f"{what} {os.fspath(ref)!r}"):
            parse_ref(os.fspath(ref), what)
    if errors:
        raise together(errors)


def is_stored(ref: PathLike | None) -> bool:
    """Return True if a REF or an OUT is an address in an object store; a Path has lost one of its slashes."""
    return ref is not None and os.fspath(ref).partition(":/")[0] in STORES


def stored_address(ref: PathLike) -> str:
    """Return an address in an object store with both of its slashes, of which a Path has lost one."""
    scheme, _, rest = os.fspath(ref).partition(":/")
    return f"{scheme}://{rest.lstrip('/')}"


def refuse_address(out: PathLike) -> None:
    """Raise OutputError for an OUT that is an address, which else would become a folder of this name."""
    if is_stored(out):
        raise OutputError(f"OUT {out}: only merge writes to an object store.", hint="name a folder, and copy it")
    if is_address(out):
        hub = "for the Hub, name a folder and --push-to-hub ORG/NAME; merge takes --no-local instead of a folder"
        raise OutputError(f"OUT {out} is an address, not a folder.", hint=_same_address(os.fspath(out)) or hub)


def is_address(text: PathLike) -> bool:
    """Return True if a path is the address of something that is not on this machine's disk."""
    return _ADDRESS.match(os.fspath(text)) is not None


def _same_address(ref: str) -> str | None:
    """Return a hint with the address as it is read here, for another tool's address in an object store."""
    if not (match := _ADDRESS.match(ref)):
        return None
    scheme = match["scheme"].lower()
    known = scheme if scheme in STORES else _SAME_STORE.get(scheme)
    return f"did you mean {known}://{ref[match.end() :]}?" if known else None


def refuse_unfinished(path: Path, what: str) -> None:
    """Raise RefError for an output that a run has begun and not finished."""
    partial = path.with_name(f"{path.name}.partial")
    if path.name and not path.exists() and partial.is_dir():
        raise RefError(
            f"{what} {path} does not exist, only {partial.name}: an unfinished output.",
            hint="rerun the command that began it to resume",
        )


def local_path(ref: str, what: str) -> Path:
    """Return a REF as a path, which need not exist."""
    if not ref:
        raise RefError(f"{what} is empty.")
    try:
        path = Path(ref).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # names that are too long, homes of nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise RefError(f"{what} {ref!r} is not a valid path: {why}.") from error
    return path


def _similar(path: Path) -> str | None:
    """Return a hint naming the entries of the parent folder that look like a missing path."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return f"{parent} does not exist either"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()])
    return f"did you mean {', '.join(str(parent / name) for name in close)}?" if close else None


def local_source(path: Path) -> Source:
    """Return a local folder or file as a Source, named by its last component as UTF-8."""
    return Source(path, path.resolve().name.encode(errors="backslashreplace").decode())


def listed(refs: PathLike | Sequence[PathLike]) -> list[str]:
    """Return one REF or several as a list of texts."""
    return [os.fspath(ref) for ref in ([refs] if isinstance(refs, (str, os.PathLike)) else refs)]


HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHERS = {"datasets": "a dataset", "spaces": "a space", "collections": "a collection", "papers": "a paper"}
"""Pages of the Hub that are not a model's, by the first word of their paths."""
_PAGE = re.compile(
    r"(?:models/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?P<kind>tree|blob|resolve)/(?P<revision>refs/[\w-]+/[^/]+|[^/]+)(?:/(?P<path>.+))?)?"
)


def read_address(ref: str, what: str) -> tuple[str, str | None, str] | None:
    """Return the repo, revision and folder that a page's address names; None if a REF is not an address.

    Raises RefError, with the words to type, for an address of something else.
    """
    if ref.startswith(tuple(f"{host}/" for host in HOSTS)):
        ref = f"https://{ref}"
    if is_stored(ref):
        hint = "copy the folder to this machine, and name the copy"
        raise RefError(f"{what} {ref!r} is in an object store; a folder on this machine is needed here.", hint=hint)
    scheme, colon, rest = ref.partition(":")
    if scheme == "hf" and colon:
        raise RefError(f"{what} {ref!r} is not a valid Hub address.", hint="write hf://org/name[@revision][/folder]")
    if not rest.startswith("//") or not scheme.isalnum():
        return None
    if scheme not in ("http", "https"):
        raise RefError(
            f"{what} {ref!r}: addresses that begin with {scheme}:// are not read.",
            hint=_same_address(ref) or f"name a path, such as {rest[2:]}, or a Hub repo as org/name",
        )
    address = urlsplit(ref)
    if address.hostname not in (*HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname):
        raise RefError(f"{what} {ref!r} is not on huggingface.co.", hint="download it, and name the folder")
    return _page(unquote(address.path).strip("/"), f"{what} {ref!r}")


def _page(path: str, subject: str) -> tuple[str, str | None, str]:
    """Return the repo, revision and folder of a page on the Hub."""
    if other := OTHERS.get(path.partition("/")[0]):
        raise RefError(f"{subject} is the page of {other}, not of a model.", hint="a Hub repo is written org/name")
    if not (match := _PAGE.fullmatch(path)):
        raise RefError(f"{subject} is not the page of a model.", hint="a Hub repo is written org/name")
    inside = PurePosixPath(match["path"] or "")
    folder = inside if match["kind"] == "tree" else inside.parent
    return match["repo"], match["revision"], "" if str(folder) == "." else str(folder)
