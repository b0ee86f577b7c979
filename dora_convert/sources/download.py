"""Download the files of a Hub repo that a verb needs, at one commit.

Downloads go through huggingface_hub, by default into its cache. Tokens are given to huggingface_hub only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..errors import HubError, RefError
from ..formats.detect import ANCHORS as ADAPTERS
from ..formats.detect import detect, model_weights, refuse_adapter, wanted_of_adapter
from ..storage.checkpoint import weight_entry
from ..storage.filenames import GGUF, RECORD, gguf_parts, is_weight_file
from ..storage.json_files import weight_map
from ..storage.pipelines import INDEX as PIPELINE
from ..storage.pipelines import files_inside
from ..storage.reader import sha256 as file_sha256
from ..storage.refs import HubRef, Source
from . import Session
from .hub_client import connection_errors, reading_errors, with_retries, without_bars

ANCHORS = (*ADAPTERS, "config.json", "model.safetensors", PIPELINE)
"""Files that show whether a repo is in the cache."""
CONNECTIONS = 8


def fetch(ref: HubRef, what: str, wanted: Callable[[Sequence[str]], Sequence[str]], session: Session) -> Source:
    """Download the files of a repo that `wanted` chooses from the names of all its files.

    Raises HubError if the Hub refuses. If the Hub cannot be reached, the cache's copy is taken.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with reading_errors(ref, what):
        try:
            info = with_retries(lambda: HfApi(token=session.token).model_info(ref.repo, revision=ref.revision))
        except HfHubHTTPError:
            raise
        except connection_errors() as error:
            return _cached_repo(ref, what, error)
        commit = str(info.sha)
        folder = (session.place(ref.repo, commit) or snapshot_folder(ref.repo, commit)) / ref.subfolder
        source = Source(folder, ref.repo, ref.repo, commit, ref.subfolder)
        prefix, names = ref.in_repo(""), [sibling.rfilename for sibling in info.siblings or ()]
        chosen = wanted([name.removeprefix(prefix) for name in names if name.startswith(prefix)])
        anchor = next((name for name in ANCHORS if name in chosen), None)
        if anchor and session.cache:
            # by the revision's own name: the cache then knows its commit even without a connection
            download(ref, anchor, session)
        download_all(source.hub, chosen, session)
        for index in (name for name in chosen if name.endswith(".index.json") and not name.startswith(RECORD)):
            where = index[: index.rfind("/") + 1]
            shards = sorted({where + file for file in weight_map(folder / index).values()})
            download_all(source.hub, shards, session)
    return source


def download_all(ref: HubRef, names: Iterable[str], session: Session) -> None:
    """Download files of a repo, several at a time, and resume partial downloads."""
    names = list(names)
    hashes = {} if all(_cached(ref, name) for name in names) else hashes_of(ref, session)
    with without_bars(), ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda name: download(ref, name, session, sha256=hashes.get(name)), names))


def hashes_of(ref: HubRef, session: Session) -> dict[str, str]:
    """Return the sha256 that the Hub names for each large file, by the file's path in the folder."""
    from huggingface_hub import HfApi

    api, prefix = HfApi(token=session.token), ref.in_repo("")
    tree = with_retries(lambda: list(api.list_repo_tree(ref.repo, recursive=True, revision=ref.revision)))
    large = [(entry.path, getattr(entry, "lfs", None)) for entry in tree]
    return {path.removeprefix(prefix): lfs.sha256 for path, lfs in large if lfs and path.startswith(prefix)}


def _cached(ref: HubRef, name: str) -> Path | None:
    """Return the cache's copy of a file of a repo."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(ref.repo, ref.in_repo(name), revision=ref.revision)
    return Path(path) if isinstance(path, str) else None


def download(
    ref: HubRef, name: str, session: Session, *, folder: Path | None = None, sha256: str | None = None
) -> Path:
    """Download one file into the session's place or a folder, and check a new file's sha256 if it is known.

    Raises HubError if the sha256 differs; the file is removed then.
    """
    from huggingface_hub import hf_hub_download

    folder, path = folder or session.place(ref.repo, str(ref.revision)), ref.in_repo(name)
    cached = not folder and _cached(ref, name)

    def get() -> str:
        return hf_hub_download(ref.repo, path, revision=ref.revision, token=session.token, local_dir=folder)

    file = Path(with_retries(get))
    blob = file.resolve()
    if not cached and sha256 and file_sha256(blob) != sha256:
        file.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{path} of {ref.repo} arrived damaged: its sha256 differs from the Hub's.",
            hint="rerun the same command to download it again",
        )
    return file


def snapshot_folder(repo: str, commit: str) -> Path:
    """Return the folder in the cache that holds, or will hold, the files of a commit."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "snapshots", commit)


def _cached_repo(ref: HubRef, what: str, error: Exception) -> Source:
    """Return the cache's copy of a repo without a connection; the copy may be incomplete."""
    from huggingface_hub import constants

    for name in ANCHORS:
        if path := _cached(ref, name):
            folder = path.parent
            commit = folder.parents[ref.subfolder.count("/")].name if ref.subfolder else folder.name
            return Source(folder, ref.repo, ref.repo, commit, ref.subfolder)
    if constants.HF_HUB_OFFLINE:
        raise HubError(
            f"{what} {ref} is neither a local path nor in the cache, and HF_HUB_OFFLINE=1 forbids to ask the Hub.",
            hint="check the spelling, or unset HF_HUB_OFFLINE",
        ) from error
    raise HubError(
        f"{what} {ref} is not a local path, the Hub cannot be reached, and the cache has no copy.",
        hint="check the spelling and the connection",
    ) from error


def wanted_of_base(names: Sequence[str]) -> list[str]:
    """Choose a base's weights or their index, the record of an earlier merge, and all other small files."""
    refuse_adapter(names, "the repo")
    if PIPELINE in names:
        entries = [
            folder + weight_entry(inner, f"the repo {folder[:-1]}") for folder, inner in files_inside(names).items()
        ]
    else:
        entries = [weight_entry([name for name in names if "/" not in name], "the repo")]
    if entries[0].endswith(GGUF):
        return [*gguf_parts(entries[0]), *(name for name in names if not is_weight_file(name))]
    return [*entries, *(name for name in names if name.startswith(f"{RECORD}/") or not is_weight_file(name))]


def fetch_base(ref: HubRef, what: str, session: Session) -> Source:
    """Download a base, or a GGUF file of a repo and the other parts of its model."""
    if not ref.file.endswith(GGUF):
        return fetch(ref, what, wanted_of_base, session)
    parts = gguf_parts(ref.file)
    source = fetch(ref.around, what, lambda names: [name for name in names if name in parts], session)
    return replace(source, path=source.path / ref.file, name=f"{source.name}/{ref.file}")


def fetch_adapter(ref: HubRef, session: Session) -> Source:
    """Download an adapter's files, or the one file that a REF names.

    Raises RefError if a repo holds several weight files, and none is an adapter by its name.
    """
    left: list[str] = []

    def wanted(names: Sequence[str]) -> list[str]:
        if ref.file:
            return [name for name in names if name in (ref.file, "adapter_config.json")]
        chosen = wanted_of_adapter(names)
        left.extend(name for name in model_weights(names) if name not in chosen)
        return chosen

    source = fetch(ref.around, "ADAPTER", wanted, session)
    if ref.file:
        return replace(source, path=source.path / ref.file, name=ref.file)
    if left and not detect(source.path):
        several = f"{source.title} holds several weight files, and no adapter by name: {', '.join(left[:5])}."
        raise RefError(several, hint=f"name one, such as hf://{ref}/{left[0]}")
    if left:
        session.notify(f"not downloaded, a model beside the adapter by its name: {', '.join(left[:5])}")
    return source
