"""Merge from and to S3, Google Cloud Storage and Azure, as emulators play them; compare with a local merge.

    python -m tests.oracles.stores [s3 gs az]

Needs the extras of the stores, and the emulators that tests/emulators.py names. `make cluster` runs it. Shards are longer
than one part of an upload.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..emulators import Bucket, emulated, missing

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import synthetic

LAYERS = 2


def run(words: list[object], code: int = 0, **variables: str) -> tuple[str, str]:
    """Run a command of dora-convert, which must exit with a code; return stdout and stderr."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    command = [sys.executable, "-m", "dora_convert", *map(str, words)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def same_weights(bucket: Bucket, name: str, folder: Path) -> int:
    """Every weight file of a folder is in the bucket, with the same bytes; return the number of files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() == bucket.files(name).keys()
    for file, path in files.items():
        if path.suffix == ".safetensors":
            assert bucket.read(f"{name}/{file}") == path.read_bytes(), file
    return len(files)


def cases(bucket: Bucket, folder: Path) -> None:
    """Run all cases, and say what came of each."""
    local = folder / "local"
    base, adapter = bucket.upload(folder / "base", "base"), bucket.upload(folder / "dora", "adapter")
    begun, target = time.monotonic(), f"{bucket.url}/out"
    out, errors = run(["merge", base, adapter, target, "--json"])
    count = same_weights(bucket, "out", local)
    sent = json.loads(out)["pushed"]["bytes_uploaded"]
    say(f"store to store: {count} files, same bytes, {time.monotonic() - begun:.1f} s, {sent} B")
    noise = [line for line in errors.splitlines() if "Could not" in line or "Warning" in line]
    assert not noise, noise
    run(["merge", base, adapter, folder / "here"])
    for path in local.glob("*.safetensors"):
        assert (folder / "here" / path.name).read_bytes() == path.read_bytes()
        (folder / "here" / path.name).unlink()
    say("store to a folder: same bytes")
    run(["verify", base, adapter, target])
    say("verify, all three in the store: agree")
    run(["unmerge", target, adapter, folder / "back"])
    run(["unmerge", local, folder / "dora", folder / "back-here"])
    for path in (folder / "back-here").glob("*.safetensors"):
        assert (folder / "back" / path.name).read_bytes() == path.read_bytes()
    say("unmerge: the bytes of a local one")
    _, errors = run(["merge", base, adapter, target], 2)
    assert "exists" in errors, errors
    say(first(errors))
    run(["merge", base, adapter, target, "--overwrite", "--max-shard-size", "60MB"])
    assert len([file for file in bucket.files("out") if file.endswith(".safetensors")]) > 3
    say("overwritten with smaller shards: no stale file is left")
    interrupted(bucket, folder, base, local)
    refusals(bucket, adapter, folder)


def interrupted(bucket: Bucket, folder: Path, base: str, local: Path) -> None:
    """Kill a merge after its first shard is uploaded and its first tensor entered; the same command does the rest."""
    words = ["merge", base, str(folder / "dora"), f"{bucket.url}/killed"]
    process = subprocess.Popen([sys.executable, "-m", "dora_convert", *words], stderr=subprocess.DEVNULL)
    shards: dict[str, object] = {}
    while not (shards and entered()) and process.poll() is None:
        time.sleep(0.05)
        shards = {name: tag for name, tag in bucket.files("killed").items() if name.endswith(".safetensors")}
    process.kill()
    process.wait()
    assert "config.json" not in bucket.files("killed"), "the entry was there before the end"
    _, errors = run(words)
    assert "resumed" in errors, errors
    same_weights(bucket, "killed", local)
    again = bucket.files("killed")
    kept = sum(again[name] == tag for name, tag in shards.items())
    notice = next(line for line in errors.splitlines() if "resumed" in line)
    say(f"killed with {len(shards)} shard uploaded, {kept} not sent again; {notice}")


def entered() -> int:
    """Return the number of tensors in the journals of unfinished merges into stores."""
    merges = Path(os.environ["HF_HOME"]) / "dora_convert/merges"
    journals = merges.glob("*/model.partial/dora_convert/journal.jsonl")
    return sum(path.read_bytes().count(b'"made"') for path in journals)


def refusals(bucket: Bucket, adapter: str, folder: Path) -> None:
    """Errors say what is missing."""
    out, elsewhere = folder / "never", f"{bucket.scheme}://no-such-bucket"
    refused = [
        ([f"{elsewhere}/base", adapter, out], {}, "does not exist"),
        ([f"{bucket.url}/nothing", adapter, out], {}, "holds no files"),
        ([folder / "base", folder / "dora", f"{elsewhere}/out"], {}, "does not exist"),
    ]
    if bucket.nobody:
        refused.append(([f"{bucket.url}/base", adapter, out], bucket.nobody, "no credentials"))
        refused.append(([folder / "base", folder / "dora", f"{bucket.url}/x"], bucket.nobody, "no credentials"))
    for words, variables, expected in refused:
        refuse(words, expected, out, variables)
    bucket.deny()
    if bucket.stranger:
        refuse([f"{bucket.url}/base", folder / "dora", out], "refused", out, bucket.stranger)
        refuse([folder / "base", folder / "dora", f"{bucket.url}/x"], "refused", out, bucket.stranger)


def refuse(words: list[object], expected: str, out: Path, variables: dict[str, str]) -> None:
    """A merge ends with exit code 2 and some words, and writes nothing."""
    _, errors = run(["merge", *words], 2, **variables)
    assert expected in errors, errors
    assert not out.exists()
    say(first(errors))


def first(errors: str) -> str:
    """The line of the error."""
    return next(line for line in errors.splitlines() if line.startswith("Error"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    schemes = sys.argv[1:] or ["s3", "gs", "az"]
    if reasons := [f"{scheme}: {reason}" for scheme in schemes if (reason := missing(scheme))]:
        sys.exit("\n".join(reasons))
    with tempfile.TemporaryDirectory(prefix="dora-convert-stores-") as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "home")
        shapes = synthetic.shapes(LAYERS, 1000, 0)
        linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        synthetic.write_base(folder / "base", shapes, 2)
        synthetic.write_adapter(folder / "dora", linear, 8, dora=True)
        run(["merge", folder / "base", folder / "dora", folder / "local"])
        for scheme in schemes:
            say(f"--- {scheme}")
            with emulated(scheme) as bucket, tempfile.TemporaryDirectory(dir=folder) as own:
                os.environ |= bucket.variables
                for each in ("base", "dora", "local"):
                    (Path(own) / each).symlink_to(folder / each)
                cases(bucket, Path(own))


if __name__ == "__main__":
    main()
