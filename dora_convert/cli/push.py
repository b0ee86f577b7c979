"""dora-convert push: the command."""

from __future__ import annotations

import click
from typing_extensions import Unpack

from ..options import UploadOptions
from . import REF, command, takes
from .sink import Sink


@command("push")
@click.argument("folder", type=REF, metavar="DIR")
@click.argument("repo_id", metavar="REPO_ID")
@takes(UploadOptions)
def push(folder: str, repo_id: str, *, sink: Sink, **keywords: Unpack[UploadOptions]) -> None:
    """Upload a merged checkpoint or an adapter to the Hub.

    DIR is only read. DIR must be complete, and is checked against its receipt first. Large files are uploaded
    one by one before the commit, so that the repo never shows half a model. The same command resumes an
    interrupted upload. The answer is the URL.

    \b
    Examples:
      dora-convert push ./merged me/merged --private
      dora-convert push ./adapter me/adapter --base-model org/base
    """
    from ..verbs.push import push as verb

    report = verb(folder, repo_id, **keywords)
    sink.show(report, report.url or report.repo)
