"""push: upload a finished checkpoint or adapter to a repo on the Hub."""

from __future__ import annotations

import os
import shlex

from typing_extensions import Unpack

from ..errors import DoraConvertError, RefError, noted, together
from ..hub.folder_contents import folder_path
from ..hub.push import push_folder
from ..hub.target import PushTarget
from ..options import UploadOptions
from ..reports.push import PushReport
from ..settings import check_base_model
from ..storage.refs import PathLike
from . import takes


@takes(UploadOptions)
def push(folder: PathLike, repo_id: str, **options: Unpack[UploadOptions]) -> PushReport:
    """Upload a merged checkpoint or an adapter to `repo_id` in one commit; a missing repo is created.

    `folder` is only read. Large files are uploaded one by one before the commit, so that the repo never shows
    half a model. The same call resumes an interrupted upload. A README in the folder is kept; without one, a
    card is written, with `base_model` as the base's repo id. `dry_run` checks the folder and uploads nothing.

    Raises DoraConvertError, and then nothing was committed: VerificationError if tensors differ from the
    folder's receipt, HubError if the Hub refuses.
    """
    path = os.fspath(folder)
    if not os.path.isdir(path) and os.path.isdir(repo_id):  # noqa: PTH112
        hint = shlex.join(["dora-convert", "push", repo_id, path])
        raise RefError(f"DIR and REPO_ID are swapped: {repo_id} is a folder.", hint=hint)
    target = PushTarget(repo_id, options["private"], options["create_pr"], options["commit_message"], options["token"])
    errors = list[tuple[str, DoraConvertError]]()
    with noted(errors, f"DIR {path!r}"):
        folder_path(path)
    with noted(errors, f"REPO_ID {repo_id!r}"):
        target.check()
    with noted(errors, f"--base-model {options['base_model']!r}"):
        check_base_model(options["base_model"])
    if errors:
        raise together(errors, "arguments are wrong")
    return push_folder(
        path,
        target,
        base_model=options["base_model"],
        dry_run=options["dry_run"],
        on_progress=options["on_progress"],
        on_notice=options["on_notice"],
    )
