"""Turn a REF into a local folder: download the files of a Hub repo that a verb needs, at one commit.

Downloads go through huggingface_hub, by default into its cache. Tokens are given to huggingface_hub only.
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
from .hub_client import connection_errors, reading_errors, with_retries, without_bars
from .session import Session

ANCHORS = (*ADAPTERS, "config.json", "model.safetensors")
"""Files that show whether a repo is in the cache."""
CONNECTIONS = 8

ChooseFiles = Callable[[Sequence[str]], Sequence[str]]
"""Chooses the files to download from the names of a repo's files."""


def fetch(ref: str, what: str, wanted: ChooseFiles, session: Session, *, revision: str | None = None) -> Source:
    """Return a REF as local files; from a Hub repo only the files that `wanted` chooses are downloaded.

    Raises RefError if the REF does not exist, HubError if the Hub refuses or cannot be reached.
    """
    parsed = parse_ref(ref, what)
    if isinstance(parsed, Path):
        return local_source(parsed)
    if revision and not parsed.revision:
        parsed = HubRef(parsed.repo, revision, parsed.subfolder)
    return _download_repo(parsed, what, wanted, session)


def _download_repo(ref: HubRef, what: str, wanted: ChooseFiles, session: Session) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    prefix = f"{ref.subfolder}/" if ref.subfolder else ""
    with reading_errors(ref, what):
        try:
            info = with_retries(lambda: HfApi(token=session.token).model_info(ref.repo, revision=ref.revision))
        except HfHubHTTPError:
            raise
        except connection_errors() as error:
            return _cached_repo(ref, prefix, what, error)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        chosen = wanted([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        anchor = next((name for name in ANCHORS if name in chosen), None)
        if anchor and session.cache:
            # by the revision's own name: the cache then knows its commit even without a connection
            download(ref.repo, prefix + anchor, ref.revision or "main", token=session.token)
        commit = str(info.sha)
        folder = (session.place(ref.repo, commit) or snapshot_folder(ref.repo, commit)) / ref.subfolder
        source = Source(folder, ref.repo, ref.repo, commit, ref.subfolder)
        download_all(source, chosen, session)
        if index := next((name for name in chosen if name.endswith(".index.json")), None):
            download_all(source, sorted(set(weight_map(folder / index).values())), session)
    return source


def download_all(source: Source, names: Iterable[str], session: Session) -> None:
    """Download files of a repo, several at a time, and resume partial downloads."""
    repo, commit = str(source.repo), str(source.commit)
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    paths = [prefix + name for name in names]
    folder, cached = session.place(repo, commit), all(_is_cached(repo, path, commit) for path in paths)
    hashes = {} if cached else hashes_of(repo, commit, session.token)

    def get(path: str) -> None:
        download(repo, path, commit, token=session.token, folder=folder, sha256=hashes.get(path, ""))

    with without_bars(), ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(get, paths))


def hashes_of(repo: str, commit: str, token: str | None) -> dict[str, str]:
    """Return the sha256 that the Hub names for each large file, by path."""
    from huggingface_hub import HfApi

    tree = with_retries(lambda: list(HfApi(token=token).list_repo_tree(repo, recursive=True, revision=commit)))
    large = [(entry.path, getattr(entry, "lfs", None)) for entry in tree]
    return {path: lfs.sha256 for path, lfs in large if lfs}


def _is_cached(repo: str, name: str, revision: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, name, revision=revision), str)


def download(
    repo: str, name: str, revision: str, *, token: str | None, folder: Path | None = None, sha256: str = ""
) -> Path:
    """Download one file into the cache or a folder, and check a new file's sha256 if it is known.

    Raises HubError if the sha256 differs; the file is removed then.
    """
    from huggingface_hub import hf_hub_download

    cached = not folder and _is_cached(repo, name, revision)
    path = Path(with_retries(lambda: hf_hub_download(repo, name, revision=revision, token=token, local_dir=folder)))
    blob = path.resolve()
    if not cached and sha256 and file_sha256(blob) != sha256:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{name} of {repo} arrived damaged: its sha256 differs from the Hub's.",
            hint="rerun the same command to download it again",
        )
    return path


def snapshot_folder(repo: str, commit: str) -> Path:
    """Return the folder in the cache that holds, or will hold, the files of a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE)
    return cache / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots" / commit


def _cached_repo(ref: HubRef, prefix: str, what: str, error: Exception) -> Source:
    """Return the cache's copy of a repo without a connection; the copy may be incomplete."""
    from huggingface_hub import constants, try_to_load_from_cache

    for name in ANCHORS:
        path = try_to_load_from_cache(ref.repo, prefix + name, revision=ref.revision)
        if isinstance(path, str):
            commit = Path(path.removesuffix(prefix + name)).name
            return Source(Path(path).parent, ref.repo, ref.repo, commit, ref.subfolder)
    offline = constants.HF_HUB_OFFLINE
    raise HubError(
        f"{what} {ref} is not a local path, the Hub cannot be reached{' with HF_HUB_OFFLINE' if offline else ''}, "
        "and the cache has no copy.",
        hint="check the spelling, or unset HF_HUB_OFFLINE" if offline else "check the spelling and the connection",
    ) from error


def wanted_of_base(names: Sequence[str]) -> list[str]:
    """Choose a base's weights or their index, the record of an earlier merge, and all other small files."""
    refuse_adapter(names, "the repo")
    entry = weight_entry([name for name in names if "/" not in name], "the repo")
    return [entry, *(name for name in names if name.startswith(f"{RECORD}/") or not is_weight_file(name))]
