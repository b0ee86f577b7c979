"""Parse a REF, the one syntax for inputs: BASE, ADAPTER and MERGED on the command line.

./folder                              a local directory; a local path wins over a repo id
org/name, org/name@revision           a repo on the Hugging Face Hub
https://huggingface.co/org/name       the address of the repo's page, /tree/revision too
hf://org/name[@revision][/subfolder]  the same, never a local path
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RefError

PathLike = str | os.PathLike[str]

_REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/\s]+(?:/[^/\s]+)*?))?")
_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:models/)?(?P<path>[^?#]*)")
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

    @property
    def hub(self) -> HubRef:
        """The repo at its commit."""
        return HubRef(str(self.repo), self.commit, self.subfolder)

    @property
    def title(self) -> str:
        """The name in receipts and cards, as a REF: never a path."""
        if not self.repo:
            return self.name
        return f"{'hf://' if self.subfolder else ''}{self.hub}"

    @property
    def address(self) -> str:
        """The repo at its commit, or the local path."""
        return self.title if self.repo else str(self.path)


def parse_ref(ref: str, what: str = "REF") -> Path | HubRef:
    """Return a REF as an existing local path or a Hub repo; raise RefError if it is neither."""
    if match := _HF_URI.fullmatch(ref):
        return HubRef(match["repo"], match["revision"], (match["subfolder"] or "").strip("/"))
    if (match := _PAGE.match(ref)) and not os.path.lexists(ref):
        return _of_page(match["path"].strip("/").split("/"), f"{what} {ref}")
    path = local_path(ref, what)
    if path.is_dir() or path.is_file():
        return path
    if path.exists() or path.is_symlink():
        kind = "not a folder or a file" if path.exists() else "a link to a path that does not exist"
        raise RefError(f"{what} {ref!r} is {kind}.")
    refuse_unfinished(path, f"{what} {ref!r}")
    if (match := _REPO.fullmatch(ref)) and not ref.startswith((".", "~")) and "@" not in (match["revision"] or ""):
        return HubRef(match["repo"], match["revision"])
    raise _not_a_ref(ref, what) or RefError(
        f"{what} {ref!r} does not exist.", hint=_similar(path) or "a Hub repo is written org/name"
    )


def refuse_unfinished(path: Path, subject: str) -> None:
    """Raise RefError for a missing folder, if the unfinished output of its name exists."""
    partial = path.with_name(f"{path.name}.partial")
    if path.name and partial.is_dir():
        raise RefError(
            f"{subject} does not exist; {partial} is an unfinished output.",
            hint="rerun the command that began it to resume",
        )


def _of_page(parts: list[str], subject: str) -> HubRef:
    """Return the repo whose page has an address; `parts` are the address after the host."""
    if parts[0] in ("datasets", "spaces"):
        raise RefError(f"{subject} is a {parts[0][:-1]} on the Hub, not a model.", hint="a model is written org/name")
    if len(parts) < 2:
        raise RefError(f"{subject} is the address of an account.", hint="a Hub repo is written org/name")
    repo = "/".join(parts[:2])
    match parts[2:]:
        case ["tree", "refs", kind, number, *folders]:
            return HubRef(repo, f"refs/{kind}/{number}", "/".join(folders))
        case ["tree", revision, *folders]:
            return HubRef(repo, revision, "/".join(folders))
        case ["blob" | "resolve", revision, *folders, _file]:
            return HubRef(repo, revision, "/".join(folders))
    return HubRef(repo)


def _not_a_ref(ref: str, what: str) -> RefError | None:
    """Return an error that says what is wrong with a text that is nearly a REF."""
    scheme, separator, rest = ref.partition("://")
    if ref.endswith("@"):
        return RefError(f"{what} {ref!r} names no revision after @.", hint=f"{ref[:-1]}, or {ref}main")
    if scheme == "hf" or ref.startswith("hf:"):
        return RefError(
            f"{what} {ref!r} is not a valid Hub address.", hint="write hf://org/name[@revision][/subfolder]"
        )
    if separator and scheme == "file":
        return RefError(f"{what} {ref!r} is an address.", hint=f"name the path: {rest}")
    if separator:
        return RefError(
            f"{what} {ref!r} is not on huggingface.co.", hint="download it, then name the path of the folder"
        )
    if _REPO.fullmatch(ref):
        return RefError(f"{what} {ref!r} names more than one revision.", hint="write org/name@revision")
    if "\\" in ref and _REPO.fullmatch(ref.replace("\\", "/")):
        return RefError(f"{what} {ref!r} does not exist.", hint=f"did you mean {ref.replace(chr(92), '/')}?")
    return None


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
