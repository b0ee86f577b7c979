"""Print a command's help: options in groups, each with the address of the page that explains it."""

from __future__ import annotations

import click

DOCS = "https://dora-convert.github.io/dora-convert/"
GROUPS = {
    "Inputs": ("cli/", (
        "base", "weight", "method", "density", "seed", "majority_sign", "include", "exclude", "allow_unmatched",
        "strict", "ignore_field", "ignore_file", "alpha", "scaling", "axis", "enable_lora", "base_as", "follow_links",
    )),
    "Result": ("precision/", (
        "dtype", "max_shard_size", "dequantize", "dequantize_touched", "requantize", "undo", "legacy_config", "format",
        "dry_run", "overwrite", "in_place", "allow_lossy",
    )),
    "Checks": ("verify/", ("verify", "verify_outputs", "level", "samples", "prompt", "prompts")),
    "Machine": ("performance/", ("device", "compute_dtype", "max_memory", "workers", "cluster")),
    "Hub": ("hub/", (
        "push_to_hub", "no_local", "private", "create_pr", "commit_message", "base_model", "cache", "token",
    )),
    "Answer": ("cli/", ("report", "verbose", "quiet", "tsv", "as_json", "help")),
}  # fmt: skip
"""The page and the options of each group; an option that is in none is the verb's own."""
_PLACES = {name: title for title, (_, names) in GROUPS.items() for name in names}


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a command's options in groups, its own first."""
    own = f"Options of {ctx.info_name} alone"
    groups: dict[str, list[tuple[str, str]]] = {title: [] for title in (own, *GROUPS)}
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
            name = "help" if "--help" in parameter.opts else str(parameter.name)
            groups[_PLACES.get(name, own)].append(record)
    for title, records in groups.items():
        heading = f"{title} ({DOCS}{GROUPS[title][0]})" if title in GROUPS else title
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
    formatter.write_paragraph()
    formatter.write_text(f"More: {DOCS}cli/#{ctx.info_name}")
