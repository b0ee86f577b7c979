"""Every verb that writes, killed or failing at each of its calls to the file system: the same command finishes.

OUT is complete or absent at every moment, nothing is left behind in the end, and what fails says so in words. By default a
share of the moments is tried, all of publishing among them; DORA_CONVERT_KILLS=all tries each one (some minutes).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import dora_convert

from .spawner import FORKS, Process
from .toy import contents, make_adapter, make_base

CODE = (Path(__file__).parent / "broken_calls.py").read_text()
ALL = os.environ.get("DORA_CONVERT_KILLS") == "all"
AT_ONCE = 4
WORDS = {
    "merge": "merge {inputs}/base {inputs}/dora out",
    "overwrite": "merge {inputs}/base {inputs}/dora out --overwrite",
    "unmerge": "unmerge {inputs}/merged {inputs}/dora out",
    "from-lora": "from-lora {inputs}/base {inputs}/lora out",
    "overwritten adapter": "from-lora {inputs}/base {inputs}/lora out --overwrite",
    "to-lora": "to-lora {inputs}/base {inputs}/dora out --rank 4",
    "extract": "extract {inputs}/base {inputs}/merged out --rank 4",
    "merge in place": "merge --in-place out {inputs}/dora",
    "unmerge in place": "unmerge --in-place out {inputs}/dora",
}
BEFORE = {
    "overwrite": "merged-lora",
    "overwritten adapter": "older",
    "merge in place": "base",
    "unmerge in place": "merged",
}
"""What OUT holds before the command."""

pytestmark = pytest.mark.skipif(not FORKS, reason="a new interpreter for each of thousands of commands")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Everything that the commands read."""
    root = tmp_path_factory.mktemp("inputs")
    base = make_base(root / "base", layers=1)
    dora, lora = (make_adapter(root / name, base, dora=name == "dora") for name in ("dora", "lora"))
    dora_convert.merge(base.path, dora, root / "merged", undo="exact")
    dora_convert.merge(base.path, lora, root / "merged-lora")
    dora_convert.from_lora(base.path, make_adapter(root / "lora2", base, dora=False, seed=5), root / "older")
    return root


@dataclass
class Attempt:
    """One command in a folder of its own, whose OUT is `out` there."""

    kind: str
    root: Path
    inputs: Path
    at: int = 0

    def start(self, what: str = "count", at: int = 0, *options: str) -> None:
        """Start the command, its `at`-th call broken."""
        if not self.root.exists():
            self.root.mkdir()
            if before := BEFORE.get(self.kind):
                shutil.copytree(self.inputs / before, self.root / "out")
        words = WORDS[self.kind].format(inputs=self.inputs).replace(" out", f" {self.root / 'out'}").split()
        told = str(self.root.with_suffix(".calls"))
        self.process = Process(["-c", CODE, what, str(at), told, *words, "--workers", "1", *options], os.environ)

    def end(self):
        """Wait for it, and take its exit code and what it said."""
        self.done = self.process.wait()
        return self.done

    def files(self) -> dict[str, bytes] | None:
        """Everything that lies under OUT's name."""
        return contents(self.root / "out") if (self.root / "out").exists() else None

    def calls(self) -> int:
        """How many calls the command made."""
        return int(self.root.with_suffix(".calls").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs):
    """Every command undisturbed, as it is asked for: what it leaves, and how many calls it makes."""

    @cache
    def run(kind, what):
        attempt = Attempt(kind, tmp_path_factory.mktemp("whole") / "at", inputs)
        attempt.start(what, 10**9)
        assert attempt.end().returncode == 0, attempt.done.stderr
        return attempt

    return run


@pytest.fixture
def whole(undisturbed, kind):
    """One of them."""
    return undisturbed(kind, "kill")


@pytest.fixture
def attempts(tmp_path, inputs, kind):
    """Break the command at some of its calls; yields each attempt when the command has ended."""

    def tried(what, points, *options):
        every = [Attempt(kind, tmp_path / f"at{at}", inputs, at) for at in points]
        for some in (every[start : start + AT_ONCE] for start in range(0, len(every), AT_ONCE)):
            for attempt in some:
                attempt.start(what, attempt.at, *options)
            for attempt in some:
                attempt.end()
            yield from some
            for attempt in some:
                shutil.rmtree(attempt.root, ignore_errors=True)

    return tried


def chosen(whole: Attempt, last: int, share: int) -> list[int]:
    """Some of a command's calls: the last ones, and a share of those before them, of each kind others."""
    calls, shift = whole.calls(), len(whole.kind)
    return [at for at in range(1, calls + 1) if ALL or at > calls - last or (at + shift) % share == 0]


def is_whole(attempt: Attempt, whole: Attempt) -> bool:
    """Whether OUT is what the command makes."""
    return attempt.files() == whole.files()


def finish(attempt: Attempt, whole: Attempt) -> str | None:
    """Run the same command once more, undisturbed; what is wrong with how it ends."""
    attempt.start()
    done = attempt.end()
    over = any(words in done.stderr for words in ("exists.", "already", "nothing to undo"))
    if done.returncode and not (done.returncode == 2 and over and is_whole(attempt, whole)):
        return f"rerun: exit {done.returncode}: {done.stderr}"
    left = sorted(path.name for path in attempt.root.iterdir())
    if left != ["out"]:
        return f"rerun: {left} is left"
    return None if is_whole(attempt, whole) else f"rerun: OUT holds {sorted(attempt.files())}"


def unfit(attempt: Attempt, whole: Attempt, inputs: Path) -> str | None:
    """What is wrong with OUT after a command that did not end well: neither absent, nor as it was, nor complete."""
    if "in place" in attempt.kind:  # files of such a folder are of both kinds; test_in_place.py looks at them
        return None
    before = BEFORE.get(attempt.kind)
    fits = (None, whole.files(), contents(inputs / before) if before else None)
    marked = attempt.files()
    if marked and before:  # a marker says that it is about to be replaced
        marked = {name: data for name, data in marked.items() if not name.startswith(".dora-convert")}
    return None if marked in fits else "OUT is neither complete nor absent"


@pytest.mark.parametrize("kind", WORDS)
def test_killed(kind, inputs, whole, attempts):
    """Killed at any call, the same command finishes."""
    wrong = {}
    for attempt in attempts("kill", chosen(whole, 12, 19)):
        if attempt.done.returncode not in (0, 9):
            wrong[attempt.at] = f"exit {attempt.done.returncode}: {attempt.done.stderr}"
        elif why := unfit(attempt, whole, inputs) or finish(attempt, whole):
            wrong[attempt.at] = why
    report(wrong, whole)


@pytest.mark.parametrize("kind", ["overwrite", "from-lora", "merge in place"])
def test_killed_twice(kind, inputs, whole, attempts):
    """Killed while it repairs what a kill has left, it repairs that."""
    wrong = {}
    for attempt in attempts("kill", chosen(whole, 4, 43)):
        for again in (1, 3):
            attempt.start("kill", again)
            attempt.end()
        if why := finish(attempt, whole):
            wrong[attempt.at] = why
    report(wrong, whole)


def complaint(attempt: Attempt, whole: Attempt, number: int, inputs: Path) -> str | None:
    """What is wrong with how a command ended whose call failed: said in words, true, and with exit code 2."""
    code, said = attempt.done.returncode, attempt.done.stderr
    if code == 0:  # what failed was not needed
        left = sorted(path.name for path in attempt.root.iterdir())
        return None if is_whole(attempt, whole) and left == ["out"] else f"exit 0, and {left} is left: {said}"
    if code != 2 or "Traceback" in said or "this is a bug" in said:
        return f"exit {code}: {said}"
    if "Error:" not in said or os.strerror(number) not in said:
        return f"the cause is not named: {said}"
    if "Nothing was written" in said and (is_whole(attempt, whole) or "what is done" in said):
        return f"something was written: {said}"
    return unfit(attempt, whole, inputs)


def report(wrong: dict[int, str], whole: Attempt) -> None:
    """Fail with every call that a command does not get over."""
    lines = [f"call {at} of {whole.calls()}: {why}" for at, why in wrong.items()]
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("what", ["ENOSPC", "EIO", "EIO+", "EMFILE"])
@pytest.mark.parametrize("kind", WORDS)
def test_failing(kind, what, inputs, whole, undisturbed, attempts):
    """A call that fails, or all from one on, is an error in words, and the same command finishes afterwards."""
    number, wrong = getattr(errno, what.rstrip("+")), {}
    for attempt in attempts(what, chosen(undisturbed(kind, what), 1, 43)):
        if why := complaint(attempt, whole, number, inputs) or finish(attempt, whole):
            wrong[attempt.at] = why
    report(wrong, undisturbed(kind, what))


@pytest.mark.parametrize("kind", ["merge"])
def test_failing_as_json(kind, inputs, whole, attempts):
    """With --json, such an error is one JSON document."""
    for attempt in attempts("ENOSPC", chosen(whole, 0, 9)[:8], "--json"):
        if attempt.done.returncode == 0:  # what failed was not needed
            continue
        assert attempt.done.returncode == 2, attempt.done.stderr
        error = json.loads(attempt.done.stderr.splitlines()[-1])["error"]
        assert os.strerror(errno.ENOSPC) in error["message"]
