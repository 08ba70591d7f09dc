"""A Hub on the loopback interface, for the client of huggingface_hub.

`HubServer` implements the HTTP protocol in memory: whoami, repository creation, preupload, LFS
batch and upload, commits with a parent check, pull requests, branches, trees, and downloads with
ETag and Range. As on the Hub, large files are on a second origin (another port), which must not
receive a token: the server records those that arrive. `server.fault(...)` injects faults.

`HubClient` is a child process with an empty cache, because the client reads its environment on
import.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from processes import started

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".zip")
OWNER_TOKEN = "hf_" + "owner" * 6  # the form of a real token, which leak detection finds
READER_TOKEN = "hf_" + "reader" * 5
STRANGER_TOKEN = "hf_" + "outside" * 4 + "ab"


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Blob:
    """A file in a commit; `lfs` is its sha256 if it is on the second origin."""

    data: bytes
    lfs: str | None = None

    @property
    def oid(self) -> str:
        if self.lfs is None:
            return git_oid(self.data)
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        return git_oid(pointer.format(self.lfs, len(self.data)).encode())

    def listing(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": self.oid,
        }
        if self.lfs:
            entry["lfs"] = {"oid": self.lfs, "size": len(self.data), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    """A repository: commits by sha, and the head of each branch."""

    kind: str
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    num_pulls: int = 0

    def commit(self, branch: str, title: str, changes: dict[str, Blob | None]) -> Commit:
        parent = self.branches.get(branch)
        tree = dict(self.commits[parent].tree) if parent else {}
        for path, blob in changes.items():
            if blob is None:
                tree = {p: b for p, b in tree.items() if p != path and not p.startswith(path + "/")}
            else:
                tree[path] = blob
        text = json.dumps([self.id, parent, title, sorted((p, b.oid) for p, b in tree.items())])
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, tree)
        self.commits[made.sha] = made
        self.branches[branch] = made.sha
        return made

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))

    def history(self, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        chain, sha = [], self.branches.get(branch)
        while sha:
            chain.append(self.commits[sha])
            sha = self.commits[sha].parent
        return chain

    def files(self, revision: str = "main") -> dict[str, bytes]:
        found = self.find(revision)
        return {path: blob.data for path, blob in found.tree.items()} if found else {}


@dataclass
class User:
    name: str
    role: str  # "write" or "read"


@dataclass
class Fault:
    """A fault in the next `times` requests whose "METHOD /path?query" matches `pattern`.

    status: answer with this status without handling the request.
    kind: "reset" closes the connection at once; "cut" in the middle of an upload or download;
        "lost" after handling the request, without an answer; "slow" waits first.
    run: called before the request is handled, for concurrent edits.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    kind: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    run: Callable[[], None] | None = None


class HubServer:
    """State and two origins of the Hub; a context manager.

    Attributes:
        url: value for HF_ENDPOINT.
        requests: (method, path) of all requests to both origins, in order.
        tokens_at_storage: authorization headers received by the second origin.
        create_calls: bodies of the requests that create a repository.
    """

    def __init__(self) -> None:
        self.users = {
            OWNER_TOKEN: User("user", "write"),
            READER_TOKEN: User("user", "read"),
            STRANGER_TOKEN: User("other", "write"),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens_at_storage: list[str] = []
        self.create_calls: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self._ports = [0, 0]
        self.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after `stop` on the same ports, with the same repositories."""
        self._servers = [
            _listen(self, port, kind)
            for port, kind in zip(self._ports, (_Hub, _Storage), strict=True)
        ]
        self._ports = [server.server_address[1] for server in self._servers]
        self.url = f"http://127.0.0.1:{self._ports[0]}"
        self.storage_url = f"http://127.0.0.1:{self._ports[1]}"

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def restart(self, seconds: float = 0.5) -> None:
        """Close all connections, and start again after `seconds` with the same repositories."""

        def back() -> None:
            self.stop()
            time.sleep(seconds)
            self.start()

        threading.Thread(target=back, daemon=True).start()

    def reset(self) -> None:
        """Delete the state, except ports and users."""
        with self.lock:
            for store in (self.repos, self.objects, self.faults, self.requests):
                store.clear()
            self.tokens_at_storage.clear()
            self.create_calls.clear()

    def fault(self, pattern: str, times: int = 1, **what: Any) -> None:
        self.faults.append(Fault(pattern, times, **what))

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.repos[kind, repo_id]

    def add_repo(
        self,
        repo_id: str,
        files: dict[str, bytes | str] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
    ) -> Repo:
        """Create a repository without the client."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        repo.commit(
            "main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}
        )
        if files:
            self.edit(repo_id, files, kind=kind)
        return repo

    def edit(
        self,
        repo_id: str,
        files: dict[str, bytes | str | None],
        *,
        kind: str = "model",
        branch: str = "main",
    ) -> str:
        """Commit files of another user; None deletes a file. Returns the sha."""
        changes: dict[str, Blob | None] = {}
        for path, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            changes[path] = None if data is None else self.blob(path, data)
        with self.lock:
            return self.repo(repo_id, kind).commit(branch, "edit", changes).sha

    def add_folder(self, repo_id: str, folder: Path, **options: Any) -> Repo:
        files = {
            str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        }
        return self.add_repo(repo_id, files, **options)

    def blob(self, path: str, data: bytes) -> Blob:
        if not path.endswith(LFS_SUFFIXES):
            return Blob(data)
        oid = hashlib.sha256(data).hexdigest()
        self.objects[oid] = data
        return Blob(data, lfs=oid)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path in self.requests)

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Dropped(Exception):
    """Reset the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which delays each body by 40 ms
    timeout = 60  # seconds, of each read and write
    hub: HubServer
    fault: Fault | None
    body: bytes

    def log_message(self, format: str, *args: Any) -> None:
        """No output: `HubServer.requests` has the requests."""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        self.raw_route = split.path
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path))
        self.fault = self.hub.next_fault(f"{self.command} {self.path}")
        try:
            self._apply_fault_and_handle()
        except _Dropped:
            self._reset()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _apply_fault_and_handle(self) -> None:
        fault = self.fault
        if fault and fault.kind == "reset":
            raise _Dropped
        self.body = self._read_body()
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault and fault.run:
            fault.run()
        if fault and fault.status:
            return self.answer(
                fault.status, {"error": f"asked to answer {fault.status}"}, fault.headers
            )
        self.handle_request()

    def handle_request(self) -> None:
        raise NotImplementedError

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        if self.fault and self.fault.kind == "cut" and self.command == "PUT":
            self.rfile.read(length // 2)
            raise _Dropped
        return self.rfile.read(length)

    def _reset(self) -> None:
        """Close with RST, like a broken connection, instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True

    def answer(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None
    ) -> None:
        if self.fault and self.fault.kind == "lost":
            raise _Dropped
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.fault.kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            raise _Dropped
        self.wfile.write(data)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, data, headers | {"Accept-Ranges": "bytes"})
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        part = f"bytes {first}-{last}/{len(data)}"
        return self.answer(206, data[first : last + 1], headers | {"Content-Range": part})


class _Storage(_Handler):
    """The second origin: objects by sha256, without accounts."""

    def handle_request(self) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.tokens_at_storage.append(token)
        oid = self.route.removeprefix("/objects/")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.answer(400, {"error": "checksum mismatch"})
            self.hub.objects[oid] = self.body
            return self.answer(200)
        if oid not in self.hub.objects:
            return self.answer(404, {"error": "no such object"})
        return self.send_file(self.hub.objects[oid], {"ETag": f'"{oid}"'})


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class _Hub(_Handler):
    """The first origin: API and small files."""

    def handle_request(self) -> None:
        try:
            with self.hub.lock:
                self._dispatch()
        except _Refused as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer(refusal.status, {"error": refusal.message}, headers)

    def _dispatch(self) -> None:
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, self.raw_route)
            if self.command in method and found:
                values = {key: unquote(value or "") for key, value in found.groupdict().items()}
                return getattr(self, name)(**values)
        raise _Refused(404, f"no route for {self.command} {self.route}")

    def user(self, *, required: bool = False) -> User | None:
        header = self.headers.get("Authorization")
        if header is None:
            if required:
                raise _Refused(401, "Invalid username or password.")
            return None
        if header.removeprefix("Bearer ") not in self.hub.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users[header.removeprefix("Bearer ")]

    def find_repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        user = self.user()
        repo = self.hub.repos.get((KINDS.get(kind, "model"), repo_id))
        owner = user is not None and user.name == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_write(repo_id)
        return repo

    def require_write(self, repo_id: str) -> None:
        user = self.user(required=True)
        assert user is not None
        as_pull_request = "create_pr" in self.query
        if user.role != "write" or (user.name != repo_id.split("/")[0] and not as_pull_request):
            raise _Refused(403, f"You don't have the rights to write to {repo_id}")

    def find_commit(self, repo: Repo, revision: str) -> Commit:
        found = repo.find(revision)
        if found is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def whoami(self) -> None:
        user = self.user(required=True)
        assert user is not None
        auth = {"accessToken": {"displayName": "token", "role": user.role}, "type": "access_token"}
        self.answer(200, {"type": "user", "name": user.name, "orgs": [], "auth": auth})

    def create_repo(self) -> None:
        call = json.loads(self.body)
        self.hub.create_calls.append(call)
        user = self.user(required=True)
        assert user is not None
        kind = call.get("type") or "model"
        repo_id = f"{call.get('organization') or user.name}/{call['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos and user.name == repo_id.split("/")[0]:
            message = f"You already created this {kind} repo"
            return self.answer(409, {"error": message, "url": url}, {"X-Error-Message": message})
        self.require_write(repo_id)
        private = call.get("visibility") == "private" or bool(call.get("private"))
        self.hub.add_repo(repo_id, kind=kind, private=private)
        return self.answer(200, {"url": url, "name": repo_id})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(header[1]) if header else {}
            ok = isinstance(metadata, dict)
        except yaml.YAMLError:
            ok = False
        errors = [] if ok else [{"message": "the metadata is not a YAML mapping"}]
        self.answer(200 if ok else 400, {"errors": errors, "warnings": []})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find_repo(kind, repo_id, write=True)
        tree = self.find_commit(repo, revision).tree
        files = []
        for sent in json.loads(self.body)["files"]:
            large = sent["path"].endswith(LFS_SUFFIXES) or sent["size"] > 10_000_000
            known = tree.get(sent["path"])
            oid = (known.lfs or known.oid) if known else None
            mode = "lfs" if large else "regular"
            files.append(
                {"path": sent["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self.answer(200, {"files": files})

    def lfs_batch(self, kind: str, repo_id: str) -> None:
        self.find_repo(kind or "models", repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/objects/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/{repo_id}.git/info/lfs/verify"},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self, kind: str, repo_id: str) -> None:
        wanted = json.loads(self.body)
        stored = self.hub.objects.get(wanted["oid"])
        ok = stored is not None and len(stored) == wanted["size"]
        self.answer(200 if ok else 404, {})

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find_repo(kind, repo_id, write=True)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header = lines[0]["value"]
        head = self.find_commit(repo, revision)
        as_pull_request = "create_pr" in self.query
        if not as_pull_request and revision not in repo.branches:
            raise _Refused(404, f"not a branch: {revision}", "RevisionNotFound")
        if header.get("parentCommit", head.sha) != head.sha and not as_pull_request:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        changes = dict(self._change(line) for line in lines[1:])
        made_url = None
        branch = revision
        if as_pull_request:
            repo.num_pulls += 1
            branch = f"refs/pr/{repo.num_pulls}"
            repo.branches[branch] = header.get("parentCommit", head.sha)
            made_url = f"{self.hub.url}/{repo_id}/discussions/{repo.num_pulls}"
        made = repo.commit(branch, header["summary"], changes)
        url = f"{self.hub.url}/{repo_id}/commit/{made.sha}"
        answer = {"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""}
        self.answer(200, answer | {"pullRequestUrl": made_url})

    def _change(self, line: dict[str, Any]) -> tuple[str, Blob | None]:
        value = line["value"]
        if line["key"] in ("deletedFile", "deletedFolder"):
            return value["path"].rstrip("/"), None
        if line["key"] == "file":
            return value["path"], Blob(base64.b64decode(value["content"]))
        if value["oid"] not in self.hub.objects:
            raise _Refused(400, f"{value['path']}: the content was not uploaded")
        return value["path"], Blob(self.hub.objects[value["oid"]], lfs=value["oid"])

    def create_branch(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find_repo(kind, repo_id, write=True)
        if revision in repo.branches:
            raise _Refused(409, f"Reference already exists: {revision}")
        repo.branches[revision] = self.find_commit(repo, "main").sha
        self.answer(200, {})

    def refs(self, kind: str, repo_id: str) -> None:
        repo = self.find_repo(kind, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.branches.items()
        ]
        self.answer(200, {"branches": branches, "tags": [], "converts": []})

    def info(self, kind: str, repo_id: str, revision: str = "") -> None:
        repo = self.find_repo(kind, repo_id)
        found = self.find_commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(found.tree)]
        answer = {"id": repo_id, "sha": found.sha, "private": repo.private, "siblings": siblings}
        self.answer(200, answer | {"tags": [], "downloads": 0, "likes": 0, "gated": False})

    def tree(self, kind: str, repo_id: str, revision: str, path: str = "") -> None:
        tree = self.find_commit(self.find_repo(kind, repo_id), revision).tree
        prefix = path.strip("/") + "/" if path else ""
        inside = {p: blob for p, blob in tree.items() if p.startswith(prefix)}
        if prefix and not inside:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: list[dict[str, Any]] = []
        folders = set()
        for name, blob in sorted(inside.items()):
            parents = name[len(prefix) :].split("/")[:-1]
            for depth in range(len(parents) if recursive else min(len(parents), 1)):
                folders.add(prefix + "/".join(parents[: depth + 1]))
            if recursive or not parents:
                entries.append(blob.listing(name))
        entries += [
            {"type": "directory", "path": p, "oid": git_oid(p.encode()), "size": 0}
            for p in sorted(folders)
        ]
        self.answer(200, entries)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        tree = self.find_commit(self.find_repo(kind, repo_id), revision).tree
        if self.headers.get("Content-Type", "").startswith("application/json"):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        found = [tree[path].listing(path) for path in wanted if path in tree]
        for path in set(wanted) - set(tree):
            if any(name.startswith(path.rstrip("/") + "/") or not path for name in tree):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.answer(200, found)

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        commit = self.find_commit(self.find_repo(kind or "models", repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.tree:
            message = f"Entry not found: {path}"
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
            return self.answer(404, {"error": message}, headers)
        blob = commit.tree[path]
        if blob.lfs is None:
            return self.send_file(blob.data, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {
            "Location": f"{self.hub.storage_url}/objects/{blob.lfs}",
            "X-Linked-Etag": f'"{blob.lfs}"',
            "X-Linked-Size": str(len(blob.data)),
        }
        return self.answer(302, b"", headers)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/repos/create", "create_repo"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), _API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    (("POST",), _PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), _PAGE + r"\.git/info/lfs/verify", "lfs_verify"),
    (("POST",), _API + r"/commit/(?P<revision>[^/]+)", "commit"),
    (("POST",), _API + r"/branch/(?P<revision>[^/]+)", "create_branch"),
    (("GET",), _API + r"/refs", "refs"),
    (("GET", "HEAD"), _API, "info"),
    (("GET",), _API + r"/revision/(?P<revision>[^/]+)", "info"),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    (("POST",), _API + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (("GET", "HEAD"), _PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


def _listen(hub: HubServer, port: int, kind: type[_Handler]) -> ThreadingHTTPServer:
    handler = type(kind.__name__, (kind,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class ClientError(Exception):
    """Exception of a `HubClient`: `kind` is the name of its class, `bases` those of its bases."""

    def __init__(self, kind: str, bases: list[str], message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.bases, self.message = kind, bases, message


_WORKER = """
import contextlib, io, json, sys, traceback
pipe = sys.stdout
sys.stdout = sys.stderr
space = {}
for line in sys.stdin:
    call = json.loads(line)
    space.update(call["values"], result=None)
    try:
        exec(call["code"], space)
        answer = {"result": space["result"]}
    except BaseException as error:
        bases = [base.__name__ for base in type(error).__mro__]
        answer = {"error": [type(error).__name__, bases, str(error), traceback.format_exc()]}
    print(json.dumps(answer), file=pipe, flush=True)
"""


class HubClient:
    """A Python process with its own cache that uses `server`; a context manager.

    Args:
        server: its `url` becomes HF_ENDPOINT.
        home: folder for HF_HOME, which contains the cache.
        token: HF_TOKEN; None for an anonymous user.
        package: False hides ddpm_hf, as if it were not installed.
        env: additional environment variables.
    """

    def __init__(
        self,
        server: HubServer,
        home: Path,
        *,
        token: str | None = OWNER_TOKEN,
        package: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.env = client_environment(server, home, token) | (env or {})
        self.log = home / "log.txt"
        hide = "" if package else "import sys; sys.modules['ddpm_hf'] = None\n"
        self._running = started(
            [sys.executable, "-c", hide + _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("ab"),
            text=True,
            env=self.env,
            cwd=home,
        )

    def __enter__(self) -> "HubClient":
        self._process = self._running.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(timeout=60)
        finally:
            self._running.__exit__(None, None, None)

    def run(self, code: str, **values: Any) -> Any:
        """Execute `code` in the process; returns its variable `result`, raises `ClientError`."""
        assert self._process.stdin
        assert self._process.stdout
        call = {"code": code, "values": {k: _plain(v) for k, v in values.items()}}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client died:\n{self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(*answer["error"])
        return answer["result"]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def client_environment(server: HubServer, home: Path, token: str | None) -> dict[str, str]:
    """Environment variables for a process that uses `server` as its Hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    kept |= {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return kept | ({"HF_TOKEN": token} if token else {})
