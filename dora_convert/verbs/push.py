"""push: a finished checkpoint or adapter into a repo on the Hub."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable

from ..errors import RefError
from ..hub.push import FolderPush
from ..hub.target import PushTarget
from ..reports.push import PushReport
from ..settings import check_base_model
from ..storage.refs import PathLike


def push(
    folder: PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> PushReport:
    """Upload a merged checkpoint or an adapter to `repo_id`, which is created if need be, in one commit.

    `folder` is only read. Large files go up one by one and the commit comes last, so that the repo never shows half a
    model; the same call goes on from where an earlier one was cut off. A README in the folder is kept; where there is
    none, a card is written, with `base_model` as the base's repo id. `dry_run` checks the folder and sends nothing.

    Raises DoraConvertError, and then nothing was committed: VerificationError where tensors are not what the folder's
    receipt says, HubError for what the Hub refuses.
    """
    check_base_model(base_model)
    given = os.fspath(folder)
    if not os.path.isdir(given) and os.path.isdir(repo_id):  # noqa: PTH112
        hint = shlex.join(["dora-convert", "push", repo_id, given])
        raise RefError(f"DIR and REPO_ID are swapped: {repo_id} is a folder.", hint=hint)
    target = PushTarget(repo_id, private=private, create_pr=create_pr, message=commit_message, token=token)
    pushing = FolderPush(given, target, base_model=base_model, on_progress=on_progress, on_notice=on_notice)
    return pushing.run(dry_run=dry_run)
