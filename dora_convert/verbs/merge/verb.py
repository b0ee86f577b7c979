"""merge: fold adapters into a base."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...hub.target import HubRoutes, PushTarget
from ...plan.options import parse_options
from ...reports.merge import DryRunReport, MergeReport
from ...settings import Settings
from ...sources.session import open_session
from ...storage.refs import PathLike, listed
from ...undo.refusals import refuse_options
from .request import MergeRequest, merge_beside, merge_in_place


def merge(
    base: PathLike | None,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike | None = None,
    *,
    weight: Sequence[float] = (),
    device: str = "auto",
    dtype: str = "auto",
    compute_dtype: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int = "160MiB",
    workers: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    undo: str | None = None,
    allow_unmatched: bool = False,
    ignore_field: Sequence[str] = (),
    verify: bool = True,
    verify_outputs: bool = False,
    base_model: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    cache: bool = True,
    no_local: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    in_place: bool = False,
    allow_lossy: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> MergeReport | DryRunReport:
    """Fold adapters into a base checkpoint: W' = W + Σ wᵢ·(applyᵢ(W) − W), each element rounded once.

    `base` and each of `adapters` is a folder or a Hub repo; a base of None is the one that the first adapter names. There is
    no `out` with `in_place` or `no_local`. `on_progress` is called with bytes done and in all, from worker threads. What the
    options mean: docs/cli.md. Raises DoraConvertError, and then leaves nothing under `out`.
    """
    refuse_options(in_place=in_place, overwrite=overwrite, allow_lossy=allow_lossy)
    kept = undo or ("exact" if in_place and not allow_lossy else "norms")
    selected = (include, exclude, allow_unmatched, ignore_field)
    options = parse_options(dtype, compute_dtype, max_shard_size, kept, *selected)
    target = PushTarget.parse(
        push_to_hub=push_to_hub, private=private, create_pr=create_pr, commit_message=commit_message, token=token
    )  # fmt: skip
    routes = HubRoutes(target, cache=cache and not no_local, local=not no_local)
    told = (device, compute_dtype, max_memory, workers, verify, base_model, on_progress, on_notice)
    settings = Settings.parse(*told, token=token, cache=routes.cache)
    with open_session(token, cache=routes.cache, notify=settings.notify) as session:
        asked = MergeRequest(
            base, listed(adapters), out, weight, options, settings, session, routes, verify_outputs, dry_run
        )
        return merge_in_place(asked, allow_lossy) if in_place else merge_beside(asked, overwrite)
