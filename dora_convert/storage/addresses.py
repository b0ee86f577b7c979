"""Read what is nearly a REF: the address of a page on the Hub, or a word that says what to type instead.

https://huggingface.co/org/name                        the repo
https://huggingface.co/org/name/tree/REVISION/folder   a revision, a folder in the repo
https://huggingface.co/org/name/blob/REVISION/file     the file's folder
"""

from __future__ import annotations

import os
import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from ..errors import RefError

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
    scheme, colon, rest = ref.partition(":")
    if scheme == "hf" and colon:
        raise RefError(f"{what} {ref!r} is not a valid Hub address.", hint="write hf://org/name[@revision][/folder]")
    if not rest.startswith("//") or not scheme.isalnum():
        return None
    if scheme not in ("http", "https"):
        raise RefError(
            f"{what} {ref!r}: addresses that begin with {scheme}:// are not read.",
            hint=f"name a path, such as {rest[2:]}, or a Hub repo as org/name",
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
