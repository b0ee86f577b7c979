"""mkdocs: links to files outside docs/ lead to the repository."""

from __future__ import annotations

import posixpath
import re
from typing import Any

REPOSITORY = "https://github.com/dora-convert/dora-convert/blob/main/"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace the relative links of a page that leave docs/."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def absolute(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        return match[0] if path.startswith("docs/") else f"]({REPOSITORY}{path})"

    return re.sub(r"\]\((\.\./[^)#]+)\)", absolute, markdown)
