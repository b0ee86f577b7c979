"""dora-convert push: the command, and its report for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
from typing_extensions import Unpack

from ..options import UploadOptions
from ..settings import format_size
from . import takes
from .sink import Sink, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.push import PushReport


@click.command("push")
@click.argument("folder", metavar="DIR")
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
    sink.show(report, report.url or report.repo, parts)


def parts(report: PushReport, *, every: bool) -> Iterator[Table | str]:
    """Yield the report for people: the files with --verbose or --dry-run, and a summary."""
    if every or report.dry_run:
        rows = [(file.path, format_size(file.bytes), file.state) for file in report.files]
        yield table(("file", ">size", "state"), rows)
    yield from (f"deleted, stale beside these weights: {name}" for name in report.deleted)
    size = format_size(report.bytes_uploaded)
    if report.dry_run:
        yield f"{len(report.files)} files, {size}; nothing was uploaded"
        return
    same = sum(file.state == "unchanged" for file in report.files)
    copied = sum(file.state == "copied" for file in report.files)
    reused = f"{same} of them unchanged" + (f", {copied} copied on the Hub" if copied else "")
    yield f"{len(report.files)} files, {reused}; {size} uploaded in {report.seconds:.1f} s"
    yield report.url
