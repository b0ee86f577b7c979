"""REF → a local folder: the files of a Hub repo that a verb needs, at one commit.

Downloads go through huggingface_hub, and mostly its cache. Tokens are handed to it and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import HubError
from ..formats.detect import ANCHORS as ADAPTERS
from ..formats.detect import refuse_adapter
from ..storage.checkpoint import weight_entry, weight_map
from ..storage.filenames import RECORD, is_weight_file
from ..storage.reader import sha256 as file_sha256
from ..storage.refs import HubRef, Source, local_source, parse_ref
from .hub_client import explained, patiently, unreachable, without_bars
from .session import Session

ANCHORS = (*ADAPTERS, "config.json", "model.safetensors")
"""Files that tell whether a repo is in the cache."""
CONNECTIONS = 8


def fetch(
    ref: str,
    what: str,
    wanted: Callable[[Sequence[str]], Sequence[str]],
    session: Session,
    *,
    revision: str | None = None,
) -> Source:
    """A REF as local files; for a Hub repo, those names of the repo's that `wanted` picks.

    Raises RefError when the REF is nothing, HubError when the Hub refuses or cannot be reached.
    """
    parsed = parse_ref(ref, what)
    if isinstance(parsed, Path):
        return local_source(parsed)
    if revision and not parsed.revision:
        parsed = HubRef(parsed.repo, revision, parsed.subfolder)
    return _download(parsed, what, wanted, session)


def _download(
    ref: HubRef, what: str, wanted: Callable[[Sequence[str]], Sequence[str]], session: Session
) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{ref.subfolder}/" if ref.subfolder else ""
    with explained(ref, what):
        try:
            info = patiently(lambda: HfApi(token=session.token).model_info(ref.repo, revision=ref.revision))
        except HfHubHTTPError:
            raise
        except unreachable() as error:
            return _cached(ref, prefix, what, error)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        chosen = wanted([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        anchor = next((name for name in ANCHORS if name in chosen), None)
        if anchor and session.cache:
            # by the revision's own name, so that the cache knows what it stands for when there is no connection
            download(ref.repo, prefix + anchor, ref.revision or "main", session.token)
        place = session.place(ref.repo, str(info.sha)) or snapshot_folder(ref.repo, str(info.sha))
        folder = place / ref.subfolder
        source = Source(folder, ref.repo, ref.repo, info.sha, ref.subfolder)
        download_all(source, chosen, session)
        if index := next((name for name in chosen if name.endswith(".index.json")), None):
            download_all(source, sorted(set(weight_map(folder / index).values())), session)
    return source


def download_all(source: Source, names: Iterable[str], session: Session) -> None:
    """Files of a repo to where a visit has them, several at a time; what was cut off is continued."""
    repo, commit = str(source.repo), str(source.commit)
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    wanted = [prefix + name for name in names]
    place, here = session.place(repo, commit), all(_is_cached(repo, name, commit) for name in wanted)
    hashes = {} if here else hashes_of(repo, commit, session.token)

    def get(name: str) -> None:
        download(repo, name, commit, session.token, place, hashes.get(name, ""))

    with without_bars(), ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(get, wanted))


def hashes_of(repo: str, commit: str, token: str | None) -> dict[str, str]:
    """The sha256 that the Hub has of each large file, by path."""
    from huggingface_hub import HfApi

    tree = patiently(lambda: list(HfApi(token=token).list_repo_tree(repo, recursive=True, revision=commit)))
    large = [(entry.path, getattr(entry, "lfs", None)) for entry in tree]
    return {path: lfs.sha256 for path, lfs in large if lfs}


def _is_cached(repo: str, name: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=revision), str)


def download(
    repo: str, name: str, revision: str, token: str | None, folder: Path | None = None, sha256: str = ""
) -> Path:
    """One file into the cache, or into a folder; one that is new here is compared with its sha256, where that is known.

    Raises HubError where the bytes are others; they are removed then.
    """
    from huggingface_hub import hf_hub_download

    here = not folder and _is_cached(repo, name, revision)
    path = Path(
        patiently(lambda: hf_hub_download(repo, name, revision=revision, token=token, local_dir=folder))
    )
    blob = path.resolve()
    if not here and sha256 and file_sha256(blob) != sha256:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{name} of {repo} arrived damaged: its sha256 is not the one that the Hub names.",
            hint="the same command downloads it again",
        )
    return path


def snapshot_folder(repo: str, commit: str) -> Path:
    """Where the cache keeps the files of a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    return cache / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit


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


def wanted_of_base(names: Sequence[str]) -> list[str]:
    """What a merge needs of a base: the weights that count, the record of the merge that made it, all other small files.

    An index brings its shards.
    """
    refuse_adapter(names, "the repo")
    entry = weight_entry([name for name in names if "/" not in name], "the repo")
    return [entry, *(name for name in names if name.startswith(f"{RECORD}/") or not is_weight_file(name))]
