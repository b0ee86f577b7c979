"""Hold the built-in prompts, and read a caller's prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import MalformedError, RefError, UsageError
from ..storage.refs import PathLike

BUILT_IN = (
    (
        "The old lighthouse keeper climbed the stairs every evening at dusk, lit the great lamp, and "
        "watched the ships pass by until"
    ),
    (
        "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return "
        "total / len(values)\n\nprint(mean([1, 2, 3]))"
    ),
    (
        "Question: A train leaves at 9:40 and arrives at 13:05, after 3 stops of 4 minutes each. How "
        "long was it moving? Answer: It was"
    ),
    (
        "Bonjour! Je voudrais réserver une table pour quatre personnes demain soir à vingt heures, si "
        "possible près de la fenêtre, parce que"
    ),
    (
        "Dear all, please find attached the minutes of our meeting on 12 March. The next one will be "
        "held in room B-204, and everybody should"
    ),
    (
        "Water boils at 100 °C at sea level. On a mountain of 3,000 m the pressure is lower, so the "
        "boiling point falls to about 90 °C, which means"
    ),
    "人工智能正在改变我们的生活方式。越来越多的公司开始使用语言模型来回答客户的问题、翻译文件和编写代码，但是也有人担心它们会带来新的问题。",
    (
        '"Who goes there?" cried the captain, drawing his sword. Nobody answered; only the wind sang in '
        "the rigging, and far away a bell began to"
    ),
)
"""Texts of several languages and kinds, each longer than LENGTH tokens in any tokenizer."""
LENGTH = 20
"""Tokens used of a built-in prompt: prompts of one length are run together, without padding."""
LONGEST = 512
"""Tokens used of a caller's prompt."""


def gather_prompts(texts: Sequence[str], file: PathLike | None) -> tuple[str, ...]:
    """Return a caller's prompts: texts, and the lines of a file; none stands for the built-in prompts.

    Raises RefError or MalformedError for a file that cannot be read, UsageError for empty prompts.
    """
    prompts = (*texts, *(_lines(file) if file is not None else ()))
    if any(not text.strip() for text in prompts):
        raise UsageError("--prompt is empty.")
    return prompts


def _lines(file: PathLike) -> list[str]:
    """Return the lines of a text file that are not blank."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RefError(f"--prompts {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise MalformedError(f"--prompts {path} is not UTF-8 text.") from error
    if lines := [line for line in text.splitlines() if line.strip()]:
        return lines
    raise UsageError(f"--prompts {path} holds no prompt.", hint="one prompt a line")
