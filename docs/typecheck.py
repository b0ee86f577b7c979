"""Check the types of every Python block of README and docs: mypy --strict, and pyright if it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def snippets(folder: Path) -> list[str]:
    """Write each block to a file of its own, named after its page and its line."""
    written = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            path = folder / f"{page.stem.replace('-', '_')}_{text.count(chr(10), 0, block.start()) + 1}.py"
            path.write_text(block[1], encoding="utf-8")
            written.append(str(path))
    return written


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        files = snippets(Path(folder))
        checks = [[sys.executable, "-m", "mypy", "--strict", *files]]
        if pyright := shutil.which("pyright"):
            checks.append([pyright, "--pythonpath", sys.executable, *files])
        codes = [subprocess.run(check, check=False, cwd=ROOT).returncode for check in checks]
    sys.exit(max(codes))
