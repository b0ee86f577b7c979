"""Merge from and to S3, as moto's server plays it, through s3fs; compare with a local merge.

    python tests/oracles/stores.py

Needs the extra `[s3]` and `moto[server]`. `make cluster` runs it. Shards are longer than one part of an upload.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import synthetic

BUCKET, LAYERS = "models", 2


def run(words: list[object], code: int = 0, **variables: str) -> tuple[str, str]:
    """Run a command of dora-convert, which must exit with a code; return stdout and stderr."""
    environment = {name: value for name, value in (os.environ | variables).items() if value}
    command = [sys.executable, "-m", "dora_convert", *map(str, words)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, (done.returncode, done.stderr)
    return done.stdout, done.stderr


def upload(s3, folder: Path, prefix: str) -> str:
    """Put a folder into the bucket; return its address."""
    for path in folder.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return f"s3://{BUCKET}/{prefix}"


def same_weights(s3, prefix: str, folder: Path) -> int:
    """Every weight file of a folder is in the bucket, with the same bytes; return the number of files."""
    listed = {each["Key"]: each["Size"] for each in s3.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in files} == listed.keys()
    for path in files:
        if path.suffix == ".safetensors":
            body = s3.get_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder).as_posix()}")["Body"]
            assert body.read() == path.read_bytes(), path.name
    return len(files)


def cases(s3, folder: Path) -> None:
    """Run all cases, and say what came of each."""
    local = folder / "local"
    run(["merge", folder / "base", folder / "dora", local])
    base, adapter = upload(s3, folder / "base", "base"), upload(s3, folder / "dora", "adapter")
    begun = time.monotonic()
    out, _ = run(["merge", base, adapter, f"s3://{BUCKET}/out", "--json"])
    count = same_weights(s3, "out", local)
    report = json.loads(out)
    say(
        f"S3 to S3: {count} files, same bytes, {time.monotonic() - begun:.1f} s, {report['pushed']['bytes_uploaded']} B"
    )
    run(["merge", base, adapter, folder / "here"])
    for path in local.glob("*.safetensors"):
        assert (folder / "here" / path.name).read_bytes() == path.read_bytes()
    say("S3 to a folder: same bytes")
    run(["verify", base, adapter, f"s3://{BUCKET}/out"])
    say("verify, all three on S3: agree")
    _, errors = run(["merge", base, adapter, f"s3://{BUCKET}/out"], 2)
    assert "exists" in errors, errors
    say(first(errors))
    interrupted(s3, folder, base, local)
    refusals(adapter, folder)


def interrupted(s3, folder: Path, base: str, local: Path) -> None:
    """Kill a merge after its first shard is uploaded; the same command does the rest."""
    words = ["merge", base, str(folder / "dora"), f"s3://{BUCKET}/killed"]
    process = subprocess.Popen([sys.executable, "-m", "dora_convert", *words], stderr=subprocess.DEVNULL)
    shards: dict[str, object] = {}
    while not shards and process.poll() is None:
        listed = s3.list_objects_v2(Bucket=BUCKET, Prefix="killed/").get("Contents", [])
        time.sleep(0.1)
        shards = {each["Key"]: each["LastModified"] for each in listed if each["Key"].endswith(".safetensors")}
    process.kill()
    process.wait()
    names = {each["Key"] for each in s3.list_objects_v2(Bucket=BUCKET, Prefix="killed/")["Contents"]}
    assert "killed/config.json" not in names, "the entry was there before the end"
    _, errors = run(words)
    assert "resumed" in errors, errors
    same_weights(s3, "killed", local)
    say(f"killed with {len(shards)} shard uploaded; {next(line for line in errors.splitlines() if 'resumed' in line)}")


def refusals(adapter: str, folder: Path) -> None:
    """Errors say what is missing."""
    out = folder / "never"
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    for words, variables, expected in (
        (["s3://no-such-bucket/base", adapter, out], {}, "does not exist"),
        ([f"s3://{BUCKET}/nothing", adapter, out], {}, "holds no files"),
        ([f"s3://{BUCKET}/base", adapter, out], nobody, "no credentials"),
        ([folder / "base", folder / "dora", "s3://no-such-bucket/out"], {}, "does not exist"),
    ):
        _, errors = run(["merge", *words], 2, **variables)
        assert expected in errors, errors
        assert not out.exists()
        say(first(errors))


def denied(folder: Path, endpoint: str) -> None:
    """With access control on, a user without rights is refused."""
    iam = boto3.client("iam", endpoint_url=endpoint)
    iam.create_user(UserName="nobody")
    key = iam.create_access_key(UserName="nobody")["AccessKey"]
    import requests

    requests.post(f"{endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
    user = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    for words in (
        [f"s3://{BUCKET}/base", folder / "dora", folder / "never"],
        [folder / "base", folder / "dora", f"s3://{BUCKET}/x"],
    ):
        _, errors = run(["merge", *words], 2, **user)
        assert "refused" in errors, errors
        say(first(errors))


def first(errors: str) -> str:
    """The line of the error."""
    return next(line for line in errors.splitlines() if line.startswith("Error"))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with tempfile.TemporaryDirectory(prefix="dora-convert-stores-") as name:
        folder = Path(name)
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint, "HF_HOME": str(folder / "home"), "AWS_CONFIG_FILE": str(folder / "no"),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no"),
        }  # fmt: skip
        shapes = synthetic.shapes(LAYERS, 1000, 0)
        linear = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
        synthetic.write_base(folder / "base", shapes, 2)
        synthetic.write_adapter(folder / "dora", linear, 8, dora=True)
        s3 = boto3.client("s3", endpoint_url=endpoint)
        s3.create_bucket(Bucket=BUCKET)
        cases(s3, folder)
        denied(folder, endpoint)
    server.stop()


if __name__ == "__main__":
    main()
