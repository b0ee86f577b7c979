"""REF → a local folder: the files of a Hub repo that a verb needs, at one commit.

Downloads go through huggingface_hub and its cache. Tokens are handed to it and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .answers import explained, patiently, unreachable
from .checkpoint import RECORD, is_weight_file, weight_entry, weight_map
from .errors import HubError
from .refs import HubRef, Source, local_source, parse_ref

ANCHORS = ("adapter_config.json", "config.json", "model.safetensors")
"""Files that tell whether a repo is in the cache."""


def fetch(
    ref: str,
    what: str,
    wanted: Callable[[Sequence[str]], Sequence[str]],
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Source:
    """A REF as local files; for a Hub repo, those names of the repo's that `wanted` picks.

    Raises RefError when the REF is nothing, HubError when the Hub refuses or cannot be reached.
    """
    parsed = parse_ref(ref, what)
    if isinstance(parsed, Path):
        return local_source(parsed)
    if revision and not parsed.revision:
        parsed = HubRef(parsed.repo, revision, parsed.subfolder)
    return _download(parsed, what, wanted, token)


def _download(
    ref: HubRef, what: str, wanted: Callable[[Sequence[str]], Sequence[str]], token: str | None
) -> Source:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{ref.subfolder}/" if ref.subfolder else ""
    with explained(ref, what):
        try:
            info = patiently(lambda: HfApi(token=token).model_info(ref.repo, revision=ref.revision))
        except HfHubHTTPError:
            raise
        except unreachable() as error:
            return _cached(ref, prefix, what, error)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        chosen = wanted(inside)
        if anchor := next((name for name in ANCHORS if name in chosen), None):
            # by the revision's own name, so that the cache knows what it stands for when there is no connection
            hf_hub_download(ref.repo, prefix + anchor, revision=ref.revision, token=token)

        def get(chosen: Sequence[str]) -> Path:
            patterns = [_escaped(prefix + name) for name in chosen]
            snapshot = snapshot_download(ref.repo, revision=info.sha, allow_patterns=patterns, token=token)
            return Path(snapshot) / ref.subfolder

        folder = get(chosen)
        if index := next((name for name in chosen if name.endswith(".index.json")), None):
            get(sorted(set(weight_map(folder / index).values())))
    return Source(folder, ref.repo, ref.repo, info.sha, ref.subfolder)


def _cached(ref: HubRef, prefix: str, what: str, error: Exception) -> Source:
    """The cache's copy of a repo when there is no connection, perhaps a partial one: opening it will tell."""
    from huggingface_hub import try_to_load_from_cache

    for name in ANCHORS:
        found = try_to_load_from_cache(ref.repo, prefix + name, revision=ref.revision)
        if isinstance(found, str):
            commit = Path(found.removesuffix(prefix + name)).name
            return Source(Path(found).parent, ref.repo, ref.repo, commit, ref.subfolder)
    raise HubError(
        f"{what} {ref} is no local path, the Hub cannot be reached, and the cache has no copy.",
        hint="check the spelling and the connection",
    ) from error


def _escaped(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def wanted_of_base(names: Sequence[str]) -> list[str]:
    """What a merge needs of a base: the weights that count, the record of the merge that made it, all other small files.

    An index brings its shards.
    """
    entry = weight_entry([name for name in names if "/" not in name], "the repo")
    return [entry, *(name for name in names if name.startswith(f"{RECORD}/") or not is_weight_file(name))]


def wanted_of_adapter(names: Sequence[str]) -> list[str]:
    """What a merge needs of an adapter: its config and tensors, and tokenizer files; not a model beside them."""
    return [
        name
        for name in names
        if "/" not in name and (name.startswith("adapter_") or not is_weight_file(name))
    ]
