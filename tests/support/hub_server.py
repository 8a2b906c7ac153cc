"""A Hugging Face hub on this machine: as much of its protocol as the real client needs, and faults on demand.

`/{repository}/resolve/{revision}/{file}` answers HEAD and GET as the hub does: small files with a git-style ETag, large
ones with their SHA-256 and a redirect to a second origin (the hub's CDN; here the same server under its other name).
"""

import base64
import hashlib
import json
import socket
import struct
import threading
import urllib.parse
from collections import defaultdict
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple

from dpn_jax.pretrained import DPN_MEAN

CONFIG = {
    "num_classes": 5,
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "label_names": ["ant", "bee", "cat", "dog", "eel"],
    },
}
FLAT_CONFIG = {"architecture": "dpn68", "num_classes": 1000, **CONFIG["pretrained_cfg"], "mean": list(DPN_MEAN)}
del FLAT_CONFIG["label_names"]

Content = bytes | Path
Fault = Literal[
    "truncated",  # Content-Length promises more than comes; what came before stays come
    "stuck",  # the same, and no attempt gets further
    "short",  # complete, but not as long as the metadata said
    "corrupt",  # one bit of the last byte is wrong
    "reset",  # the connection is reset in the middle
    "error",  # 500
]
LARGE = (".safetensors", ".bin")


class Request(NamedTuple):
    """One request that the server got."""

    method: str
    file: str
    """The file's name, without folder and revision."""
    is_body: bool
    """Whether it came to the CDN."""
    start: int
    """First byte wanted."""


class Commit(NamedTuple):
    """What a client committed."""

    repository: str
    branch: str
    message: str
    files: tuple[str, ...]
    is_pull_request: bool
    private: bool | None
    """As the repository was created."""


class Hub:
    """A running hub; use it as a context manager.

    Attributes:
      endpoint: what `HF_ENDPOINT` is to be.
      requests: what was asked for, by repository.
      gated: repositories whose files are not for everybody.
      commits: what was committed by clients.
      uploads: the large files that were uploaded, by SHA-256.
    """

    def __init__(self) -> None:
        self._commits: dict[str, dict[str, Mapping[str, Content]]] = defaultdict(dict)
        self._branches: dict[str, dict[str, str]] = defaultdict(dict)
        self._faults: dict[tuple[str, str, bool], list[Fault]] = {}
        self.requests: dict[str, list[Request]] = defaultdict(list)
        self.gated: set[str] = set()
        self.commits: list[Commit] = []
        self.uploads: dict[str, bytes] = {}
        self.private: dict[str, bool | None] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, files: Mapping[str, Content], *, branch: str = "main") -> str:
        """Commits files to a branch; returns the commit."""
        commit = hashlib.sha1(f"{repository} {branch} {len(self._commits[repository])}".encode()).hexdigest()
        self._commits[repository][commit] = files
        self._branches[repository][branch] = commit
        return commit

    def fail(self, repository: str, file: str, fault: Fault, *, times: int = 1, on_metadata: bool = False) -> None:
        """Makes the next requests for a file's body (or its metadata) fail."""
        self._faults[repository, file, on_metadata] = [fault] * times

    def files(self, repository: str, revision: str) -> Mapping[str, Content] | None:
        """What a commit or branch holds."""
        return self._commits[repository].get(self.commit(repository, revision))

    def commit(self, repository: str, revision: str) -> str:
        """The commit that a branch points to, or itself."""
        return self._branches[repository].get(revision, revision)

    @property
    def repositories(self) -> list[str]:
        """What there is."""
        return list(self._branches)

    def next_fault(self, repository: str, file: str, *, on_metadata: bool) -> Fault | None:
        """Takes one fault off the list."""
        faults = self._faults.get((repository, file, on_metadata))
        return faults.pop() if faults else None

    def downloads(self, repository: str) -> list[str]:
        """The large files whose bodies were asked for."""
        return [request.file for request in self.requests[repository] if request.is_body]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is none of our business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """What `huggingface_hub.HfApi.upload_folder` asks of a hub."""
        hub, url = self.server.hub, urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._refuse(HTTPStatus.UNAUTHORIZED, "Unauthorized")
        if url.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'you'}/{asked['name']}"
            if repository in hub.repositories:
                return self._json({"url": f"{hub.endpoint}/{repository}"}, HTTPStatus.CONFLICT)
            hub.add(repository, {})
            hub.private[repository] = asked.get("private", asked.get("visibility") == "private")
            return self._json({"url": f"{hub.endpoint}/{repository}"})
        if url.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if url.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                item | {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        repository, _, rest = url.path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": [file | {"shouldIgnore": False} for file in files]})
        repository, _, branch = url.path.removeprefix("/api/models/").partition("/commit/")
        header, *operations = map(json.loads, body.splitlines())
        new: dict[str, Content] = {}
        for operation in operations:
            value = operation["value"]
            large = operation["key"] == "lfsFile"
            new[value["path"]] = hub.uploads[value["oid"]] if large else base64.b64decode(value["content"])
        pull_request = "create_pr=1" in url.query
        message, private = header["value"]["summary"], hub.private.get(repository)
        hub.commits.append(Commit(repository, branch, message, tuple(sorted(new)), pull_request, private))
        commit = "0" * 40
        if not pull_request:
            commit = hub.add(repository, {**(hub.files(repository, branch) or {}), **new}, branch=branch)
        found = {"success": True, "commitOid": commit, "commitUrl": f"{hub.endpoint}/{repository}/commit/{commit}"}
        request = {"pullRequestUrl": f"{hub.endpoint}/{repository}/discussions/1"} if pull_request else {}
        return self._json(found | request | {"hookOutput": ""})

    def do_PUT(self) -> None:
        """The body of a large file."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
        self.server.hub.uploads[self.path.removeprefix("/lfs/")] = content
        self._json({})

    def _json(self, value: object, status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self._end_headers({"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _answer(self) -> None:
        hub = self.server.hub
        is_body = self.path.startswith("/cdn/")
        repository, _, rest = self.path.removeprefix("/cdn").strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        hub.requests[repository].append(Request(self.command, file, is_body, start))
        if repository not in hub.repositories:
            return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        if repository in hub.gated:
            return self._refuse(HTTPStatus.FORBIDDEN, "GatedRepo")
        files = hub.files(repository, revision)
        if files is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        commit = hub.commit(repository, revision)
        if file not in files:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", {"X-Repo-Commit": commit})
        content = files[file] if isinstance(files[file], bytes) else files[file].read_bytes()
        fault = hub.next_fault(repository, file, on_metadata=not is_body)
        if fault == "error":
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "Oops")
        if fault == "reset" and not is_body:
            return self._reset()
        if is_body:
            return self._send(content, fault, start)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE):
            self.send_response(HTTPStatus.FOUND)
            headers |= {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{hub.cdn}/cdn/{repository}/resolve/{commit}/{file}",
                "Content-Length": "0",
            }
            content = b""
        else:
            self.send_response(HTTPStatus.OK)
            blob = b"blob %d\0%s" % (len(content), content)
            headers |= {"ETag": f'"{hashlib.sha1(blob).hexdigest()}"', "Content-Length": str(len(content))}
        self._end_headers(headers)
        if self.command == "GET":
            self.wfile.write(content)
        return None

    def _send(self, content: bytes, fault: Fault | None, start: int) -> None:
        if fault == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":
            content = content[:-8]
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        headers = {"Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._end_headers(headers)
        middle = len(content) // 2 if fault in ("truncated", "stuck", "reset") else len(content)
        self.wfile.write(content[start:middle])
        self.wfile.flush()
        if fault == "reset":
            self._reset()
        self.close_connection = middle < len(content)

    def _refuse(self, status: HTTPStatus, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self._end_headers({"X-Error-Code": code, "Content-Length": "0"} | dict(headers or {}))

    def _end_headers(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
