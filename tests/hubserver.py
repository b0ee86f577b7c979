"""A Hub on loopback for tests: a real HTTP server that a real huggingface_hub talks to, and that can be made to fail.

A repo is a folder. Reading serves its files as they are at that moment, under whichever revision; a commit writes into
it. Weights go through the LFS routes, everything else comes inside commits, as on the Hub.
"""

# ruff: noqa: N815, RET502, RET503 - a route ends with its reply
from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .spawner import Process

COMMIT = {"main": "a" * 40, "v2": "b" * 40}
"""What a repo's revisions stand for until something is committed to it."""
LFS = (".safetensors", ".bin", ".gguf")


@dataclass
class Fault:
    """A fault in the next few requests that match: a status, a broken connection, wrong bytes, or a wait."""

    pattern: str
    times: int
    status: int = 0
    code: str = ""
    message: str = "because the test says so"
    cut: bool = False
    corrupt: bool = False
    hold: bool = False
    skip: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


@dataclass
class Repo:
    """A folder of files, and the commits that were made to it."""

    folder: Path
    private: bool = False
    commits: list[str] = field(default_factory=lambda: [COMMIT["main"]])

    def files(self) -> dict[str, Path]:
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def commit_of(self, revision: str) -> str | None:
        """The commit that a revision stands for; the first head keeps meaning the same files."""
        known = {"main": self.commits[-1], "v2": COMMIT["v2"], COMMIT["v2"]: COMMIT["v2"]}
        return revision if revision in self.commits else known.get(revision)


class Hub(ThreadingHTTPServer):
    """The server. `requests` lists method, path and token of each request; `sent` the files read, and how many bytes."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path], root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = dict(repos)
        self.state: dict[str, Repo] = {}
        self.root, self.requests, self.gated = root, [], set()
        self.blobs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.created: list[dict] = []
        self.messages: list[str] = []
        self.faults: list[Fault] = []
        self.sent: list[tuple[str, int]] = []
        self.taken: set[str] = set()
        self.copies = "yes"  # or "no": files are not copied to other repos; or "lost": they are not there afterwards
        self.copied: list[str] = []
        self.on_read: Callable[[str], None] = lambda _: None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, pattern: str, status: int = 0, *, times: int = 1, **how) -> Fault:
        """Let the next requests whose "METHOD /path" matches go wrong."""
        self.faults.append(Fault(pattern, times, status, **how))
        return self.faults[-1]

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def seen(self, pattern: str) -> int:
        """Return the number of requests that have matched."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path, _ in self.requests)

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """One connection; routes are named after what huggingface_hub calls them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer's body waits 40 ms for its head's acknowledgement
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        request = f"{self.command} {path}"
        self.server.requests.append((self.command, path, self.headers.get("Authorization")))
        self.fault = self.server.fault_of(request)
        if self.fault and self.fault.hold:
            self.fault.reached.set()
            self.fault.released.wait(60)
            return self.hang_up()
        if self.fault and self.fault.cut and self.command in ("PUT", "POST"):
            return self.hang_up()
        self.body = self.read_body()
        if self.fault and self.fault.status:
            return self.refuse(self.fault.status, self.fault.code, self.fault.message)
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, request):
                return route(self, *match.groups())
        return self.refuse(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body, headers["Content_Type"] = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault and self.fault.cut:
                self.wfile.write(body[: len(body) // 2])
                return self.hang_up()
            self.wfile.write(body)
        return None

    def refuse(self, status, code, message=None):
        headers = {"X_Error_Message": message or code} | ({"X_Error_Code": code} if code else {})
        self.reply(status, {"error": message or code}, **headers)

    def repo(self, name) -> Repo | None:
        """A repo that may be seen; else the refusal is sent."""
        if name not in self.server.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif name in self.server.gated:
            self.refuse(403, "GatedRepo")
        else:
            return self.server.state.setdefault(name, Repo(self.server.repos[name]))
        return None

    # reading

    def whoami(self):
        self.reply(200, {"type": "user", "name": "me", "orgs": []})

    def model(self, name, revision):
        if not (repo := self.repo(name)):
            return
        if not (commit := repo.commit_of(revision or "main")):
            return self.refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": file} for file in repo.files()]
        body = {"_id": "1", "id": name, "sha": commit, "siblings": siblings, "private": repo.private, "tags": []}
        self.reply(200, body)

    def tree(self, name, _revision):
        if repo := self.repo(name):
            self.reply(200, [entry(file, path) for file, path in repo.files().items()])

    def resolve(self, name, revision, file):
        if not (repo := self.repo(name)):
            return
        if file not in repo.files():
            return self.refuse(404, "EntryNotFound")
        path, commit = repo.files()[file], repo.commit_of(revision)
        data, about = path.read_bytes(), entry(file, path)
        tag = about["lfs"]["oid"] if "lfs" in about else about["oid"]
        headers = {"X_Repo_Commit": commit, "ETag": f'"{tag}"', "Accept_Ranges": "bytes"}
        if "lfs" in about:
            headers |= {"X_Linked_Size": len(data), "X_Linked_Etag": f'"{tag}"'}
        if self.fault and self.fault.corrupt and self.command == "GET":
            data = bytes(byte ^ 1 for byte in data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {start}-{stop}/{len(data)}"
            self.count(f"{name}/{file}", len(data[start : stop + 1]))
            return self.reply(206, data[start : stop + 1], **headers)
        self.count(f"{name}/{file}", len(data))
        self.reply(200, data, Content_Length=len(data), **headers)

    def count(self, name, nbytes):
        if self.command == "GET":
            self.server.sent.append((name, nbytes))
            self.server.on_read(name)

    # writing

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.server.repos or name in self.server.taken:
            return self.reply(409, {"error": f"You already created {name}", "url": f"{self.server.url}/{name}"})
        folder = self.server.root / "created" / name
        folder.mkdir(parents=True)
        self.server.created.append(asked)
        self.server.state[name] = Repo(folder, private=asked.get("visibility") == "private")
        self.server.repos[name] = folder
        self.reply(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def validate(self):
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, name, _revision):
        if not (repo := self.repo(name)):
            return
        there = repo.files()
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in there:
                about = entry(file["path"], there[file["path"]])
                answer["oid"] = about["lfs"]["oid"] if "lfs" in about else about["oid"]
            answers.append(answer)
        self.reply(200, {"files": answers})

    def batch(self, _name):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                found["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(found)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def duplicate(self, name):
        """Copy large files to another repo: objects that a commit there may point to."""
        asked = json.loads(self.body)
        if not (repo := self.repo(name)):
            return
        if self.server.copies == "no":
            failed = [{"sha256": file["sha256"], "error": "another region"} for file in asked["files"]]
            return self.reply(200, {"success": False, "failed": failed})
        for file in asked["files"]:
            data = repo.files()[file["filename"]].read_bytes()
            assert file["sha256"] == hashlib.sha256(data).hexdigest()
            assert file["xetHash"] == xet(data)
            self.server.copied.append(file["filename"])
            if self.server.copies == "yes":
                self.server.blobs[file["sha256"]] = data
        self.reply(200, {"success": True, "failed": []})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "", "these bytes have another hash")
        self.server.blobs[oid] = self.body
        self.server.uploads.append(oid)
        self.reply(200)

    def commit(self, name, _revision):
        if not (repo := self.repo(name)):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", repo.commits[-1]) != repo.commits[-1]:
            return self.refuse(412, "", "a commit has happened since")
        contents = {line["value"]["path"]: line for line in lines if line["key"] in ("file", "lfsFile")}
        for file, line in contents.items():
            if line["key"] == "lfsFile" and line["value"]["oid"] not in self.server.blobs:
                return self.refuse(400, "", f"{file} points to an object that is not there")
        self.server.messages.append(header["summary"])
        answer = {"success": True, "hookOutput": ""}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        else:
            for file, line in contents.items():
                write(repo.folder / file, self.content(line))
            for line in lines:
                if line["key"] == "deletedFile":
                    (repo.folder / line["value"]["path"]).unlink()
            repo.commits.append(hashlib.sha1(repo.commits[-1].encode()).hexdigest())
        oid = repo.commits[-1]
        self.reply(200, answer | {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def content(self, line):
        value = line["value"]
        return base64.b64decode(value["content"]) if line["key"] == "file" else self.server.blobs[value["oid"]]


def entry(name, path):
    """A file as the tree route lists it: git's hash, and the LFS hash of weights."""
    data = path.read_bytes()
    found = {"type": "file", "path": name, "size": len(data)}
    found["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if name.endswith(LFS):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        found["xetHash"] = xet(data)
    return found


def xet(data):
    """Not Xet's hash, but one that its files have."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", Handler.model),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", Handler.tree),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"POST /api/models/([^/]+/[^/]+)/lfs-files/duplicate", Handler.duplicate),
    (r"PUT /lfs/([0-9a-f]{64})", Handler.put),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
]


def run(hub, home, *words, **environment):
    """The command in a process of its own: huggingface_hub reads its environment once."""
    done = start(hub, home, *words, **environment).wait()
    assert "Traceback" not in done.stderr, done.stderr
    return done


def start(hub, home, *words, **environment):
    """The same, while it runs."""
    return Process([str(word) for word in words], settings(hub, home, **environment))


def settings(hub, home, **environment):
    """The environment in which huggingface_hub talks to this server over LFS."""
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "2", "HF_TOKEN": "hf_secret", **environment}
