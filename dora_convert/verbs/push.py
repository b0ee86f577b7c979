"""push: upload a finished checkpoint or adapter to a repo on the Hub."""

from __future__ import annotations

import os
import shlex

from typing_extensions import Unpack

from ..errors import RefError
from ..hub.push import FolderPush
from ..hub.target import PushTarget
from ..options import UploadOptions, takes
from ..reports.push import PushReport
from ..settings import check_base_model
from ..storage.refs import PathLike


@takes(UploadOptions)
def push(folder: PathLike, repo_id: str, **options: Unpack[UploadOptions]) -> PushReport:
    """Upload a merged checkpoint or an adapter to `repo_id` in one commit; a missing repo is created.

    `folder` is only read. Large files are uploaded one by one before the commit, so that the repo never shows
    half a model. The same call resumes an interrupted upload. A README in the folder is kept; without one, a
    card is written, with `base_model` as the base's repo id. `dry_run` checks the folder and uploads nothing.

    Raises DoraConvertError, and then nothing was committed: VerificationError if tensors differ from the
    folder's receipt, HubError if the Hub refuses.
    """
    check_base_model(options["base_model"])
    path = os.fspath(folder)
    if not os.path.isdir(path) and os.path.isdir(repo_id):  # noqa: PTH112
        hint = shlex.join(["dora-convert", "push", repo_id, path])
        raise RefError(f"DIR and REPO_ID are swapped: {repo_id} is a folder.", hint=hint)
    target = PushTarget(repo_id, options["private"], options["create_pr"], options["commit_message"], options["token"])
    base_model, on_progress, on_notice = options["base_model"], options["on_progress"], options["on_notice"]
    upload = FolderPush(path, target, base_model=base_model, on_progress=on_progress, on_notice=on_notice)
    return upload.run(dry_run=options["dry_run"])
