"""dora-convert push."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..sizes import format_size
from . import options
from .sink import Sink, printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from ..reports.push import PushReport


@click.command("push")
@click.argument("folder", metavar="DIR")
@click.argument("repo_id", metavar="REPO_ID")
@options.repo
@options.base_model
@click.option("--dry-run", is_flag=True, help="Check DIR, list what would be uploaded, and send nothing.")
@options.token
@options.talk
def command(folder: str, repo_id: str, *, as_json: bool, quiet: bool, verbose: bool, **chosen: Any) -> None:
    """Upload a merged checkpoint or an adapter to the Hub.

    DIR is only read. It must be whole, and what its receipt says is checked first. Large files go up one by one and one
    commit comes last: the repo never shows half a model, and the same command goes on where it was cut off. The answer
    is the URL.

    \b
    Examples:
      dora-convert push ./merged me/merged --private
      dora-convert push ./adapter me/adapter --base-model org/base
    """
    from ..verbs.push import push

    sink = Sink(as_json=as_json, quiet=quiet, verbose=verbose)
    try:
        report = push(folder, repo_id, on_progress=sink.progress, on_notice=sink.notice, **chosen)
    finally:
        sink.close()
    sink.show(report, report.url or report.repo, lambda every: parts(report, every=every))


def parts(report: PushReport, *, every: bool) -> Iterator[Table | str]:
    """The report for people: every file if asked for, and what it comes to."""
    if every or report.dry_run:
        rows = [(file.path, format_size(file.bytes), file.state) for file in report.files]
        yield table(("file", ">size", "state"), rows)
    yield from (f"deleted, stale beside these weights: {printable(name)}" for name in report.deleted)
    size = format_size(report.bytes_uploaded)
    if report.dry_run:
        yield f"{len(report.files)} files, {size}; nothing was uploaded"
        return
    same = sum(file.state == "unchanged" for file in report.files)
    copied = sum(file.state == "copied" for file in report.files)
    there = f"{same} of them unchanged" + (f", {copied} copied on the Hub" if copied else "")
    yield f"{len(report.files)} files, {there}; {size} uploaded in {report.seconds:.1f} s"
    yield report.url
