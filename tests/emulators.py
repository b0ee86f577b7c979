"""Start emulators of object stores, and look into their buckets with the stores' own clients, not with fsspec.

S3 is played by moto, Google Cloud Storage by gcp-storage-emulator, Azure by azurite. `make cluster` installs them.
`AZURITE` names azurite's command if it is not on the path.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "models"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of azurite's only account, which its manual names."""


class Bucket:
    """A bucket of one store; files go by their names in it."""

    scheme: str
    endpoint: str
    variables: dict[str, str]
    """The environment in which fsspec finds the emulator, with credentials."""
    nobody: dict[str, str]
    """Changes to the environment that take the credentials away."""
    stranger: dict[str, str] = {}  # noqa: RUF012
    """Changes to the environment that give credentials without rights, once `deny` was called."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint

    @property
    def url(self) -> str:
        return f"{self.scheme}://{BUCKET}"

    def files(self, folder: str) -> dict[str, object]:
        """Return the files of a folder, and for each a value that changes when it is written."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def deny(self) -> None:
        """Check rights from now on, where the emulator can."""

    def upload(self, folder: Path, name: str) -> str:
        """Put a folder into the bucket; return its address."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{name}"


class S3(Bucket):
    """moto's server."""

    scheme = "s3"
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}  # noqa: RUF012

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.variables = {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint, "AWS_CONFIG_FILE": "/no/file", "AWS_SHARED_CREDENTIALS_FILE": "/no/file",
        }  # fmt: skip
        import requests

        requests.post(f"{endpoint}/moto-api/reset", timeout=10)  # an earlier server's buckets
        self._client = self._connect("s3")
        self._client.create_bucket(Bucket=BUCKET)

    def _connect(self, service: str):
        import boto3

        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client(service, endpoint_url=self.endpoint, **keys)

    def files(self, folder: str) -> dict[str, object]:
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{folder}/").get("Contents", [])
        return {each["Key"].removeprefix(f"{folder}/"): (each["LastModified"], each["ETag"]) for each in found}

    def read(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def deny(self) -> None:
        import requests

        iam = self._connect("iam")
        iam.create_user(UserName="nobody")
        key = iam.create_access_key(UserName="nobody")["AccessKey"]
        requests.post(f"{self.endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
        self.stranger = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}


def _mend_tags() -> None:
    """Have moto hash a file under the file's lock: two listings at once read one buffer, and found a wrong tag."""
    from moto.s3.models import FakeKey

    tag = FakeKey.etag.fget
    if tag.__name__ != "etag":
        return

    def locked(key):
        with key.lock:
            return tag(key)

    FakeKey.etag = property(locked)


class Refusing(BaseHTTPRequestHandler):
    """Google's answers to callers without credentials or without rights, as its manual shows them."""

    code, caller = 401, "Anonymous caller"

    def do_GET(self) -> None:
        text = f"{self.caller} does not have storage.objects.list access to the Google Cloud Storage bucket. "
        text += "Permission 'storage.objects.list' denied on resource (or it may not exist)."
        error = {"message": text, "domain": "global", "reason": "required" if self.code == 401 else "forbidden"}
        body = json.dumps({"error": {"code": self.code, "message": text, "errors": [error]}}).encode()
        self.send_response(self.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Denying(Refusing):
    """The answers to a known caller."""

    code, caller = 403, "nobody@project.iam.gserviceaccount.com"


def _answering(handler: type[BaseHTTPRequestHandler]) -> str:
    """Start a server in a thread; return its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


class Google(Bucket):
    """gcp-storage-emulator, which checks no rights: other servers refuse."""

    scheme = "gs"

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.variables = {"STORAGE_EMULATOR_HOST": endpoint}
        self.nobody = {"STORAGE_EMULATOR_HOST": _answering(Refusing)}
        self.stranger = {"STORAGE_EMULATOR_HOST": _answering(Denying)}
        from google.auth.credentials import AnonymousCredentials
        from google.cloud.storage import Client

        client = Client("test", credentials=AnonymousCredentials(), client_options={"api_endpoint": endpoint})
        self._bucket = client.create_bucket(BUCKET)

    def files(self, folder: str) -> dict[str, object]:
        found = self._bucket.list_blobs(prefix=f"{folder}/")
        return {each.name.removeprefix(f"{folder}/"): (each.generation, each.etag) for each in found}

    def read(self, name: str) -> bytes:
        return self._bucket.blob(name).download_as_bytes()

    def write(self, name: str, data: bytes) -> None:
        self._bucket.blob(name).upload_from_string(data)


class Azure(Bucket):
    """azurite, which always checks the key."""

    scheme = "az"
    nobody = {"AZURE_STORAGE_CONNECTION_STRING": ""}  # noqa: RUF012

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        from azure.storage.blob import BlobServiceClient

        words = self._words(AZURE_KEY)
        self.variables = {"AZURE_STORAGE_CONNECTION_STRING": words}
        self.stranger = {"AZURE_STORAGE_CONNECTION_STRING": self._words("c3RyYW5nZXI=")}
        self._container = BlobServiceClient.from_connection_string(words).create_container(BUCKET)

    def _words(self, key: str) -> str:
        account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key}"
        return f"{account};BlobEndpoint={self.endpoint}/devstoreaccount1;"

    def files(self, folder: str) -> dict[str, object]:
        found = self._container.list_blobs(name_starts_with=f"{folder}/")
        return {each.name.removeprefix(f"{folder}/"): (each.last_modified, each.etag) for each in found}

    def read(self, name: str) -> bytes:
        return self._container.download_blob(name).readall()

    def write(self, name: str, data: bytes) -> None:
        self._container.upload_blob(name, data, overwrite=True)


def _azurite() -> str | None:
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


def missing(scheme: str) -> str:
    """Return the reason why a store cannot be played here; empty if it can."""
    needed = {"s3": ("s3fs", "moto", "boto3"), "gs": ("gcsfs", "gcp_storage_emulator"), "az": ("adlfs",)}[scheme]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if scheme == "az" and not _azurite():
        absent.append("azurite (npm install azurite)")
    return f"not installed: {', '.join(absent)}" if absent else ""


@contextmanager
def emulated(scheme: str) -> Iterator[Bucket]:
    """Start the emulator of a store, with an empty bucket; stop it at the end."""
    if scheme == "s3":
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        _mend_tags()
        server = ThreadedMotoServer(port=0)
        server.start()
        try:
            yield S3("http://{}:{}".format(*server.get_host_and_port()))
        finally:
            server.stop()
        return
    with tempfile.TemporaryDirectory(prefix="dora-convert-emulator-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [str(_azurite()), "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)]
        words += ["--location", folder]
        if scheme == "gs":
            words = [sys.executable, "-c", "from gcp_storage_emulator.__main__ import main; main()", "start"]
            words += ["--host", "127.0.0.1", "--port", str(port), "--in-memory"]
        with _process(words, port):
            yield (Google if scheme == "gs" else Azure)(f"http://127.0.0.1:{port}")


@contextmanager
def _process(words: list[str], port: int) -> Iterator[None]:
    """Run a server until the end of the block."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not _listens(port):
            assert process.poll() is None, words
            assert time.monotonic() < end, words
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
