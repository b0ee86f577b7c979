"""mkdocs: links to files outside docs/ lead to the repository, and the site holds the schema of the reports."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

REPOSITORY = "https://github.com/dora-convert/dora-convert/blob/main/"
SCHEMA = "report.schema.json"
CHANGELOG = '--8<-- "CHANGELOG.md"'


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Replace the relative links of a page that leave docs/; those of the changelog begin at the repository's root."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    if markdown.strip() == CHANGELOG:
        text = (Path(config["config_file_path"]).parent / "CHANGELOG.md").read_text(encoding="utf-8")
        markdown = re.sub(r"\]\((?!https?:|#)(?:docs/)?", lambda match: "](" + "../" * ("docs/" not in match[0]), text)

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        return match[0] if path.startswith("docs/") else f"]({REPOSITORY}{path})"

    return re.sub(r"\]\((\.\./[^)#]+)\)", absolute, markdown)


def on_files(files: Any, config: Any, **_: Any) -> None:
    """Add the schema that the package holds."""
    source = Path(config["config_file_path"]).parent / "dora_convert" / SCHEMA
    files.append(File.generated(config, SCHEMA, content=source.read_text(encoding="utf-8")))
