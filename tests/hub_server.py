# Copyright 2026 The LrcSSM-HF authors. Licensed under the Apache License, Version 2.0.
"""A Hugging Face Hub on the loopback interface: what uploading and downloading models uses of its HTTP interface.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("user/model")

Commits are kept in memory, whole or not at all. What fails, and how, a test says with `hub.fail`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


CUT = "cut"  # A failure: the request is carried out, and the connection ends in the middle of the answer.
_LARGE = (".safetensors", ".png")  # What, in a model folder, goes to Git LFS.


class Blob(NamedTuple):
    content: bytes
    is_large: bool

    @property
    def oid(self) -> str:
        """What the Hub tells files apart by: sha256 of large files, and of others the name git gives them."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, Blob]


class Repository:
    def __init__(self, private: bool):
        self.private = private
        self.commits = []
        self.add("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs -text\n", is_large=False)})

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def add(self, message: str, files: dict[str, Blob]) -> Commit:
        oid = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.head

    def find(self, revision: str) -> Commit | None:
        return self.head if revision == "main" else next((c for c in self.commits if c.oid == revision), None)


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class HubServer(ThreadingHTTPServer):
    """Attributes: `url`, the only valid `token`, `repositories` by name, `requests`, each as "GET /path range", and
    the `failures` asked for."""

    daemon_threads = True
    token = "hf_the_only_valid_token"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.failures: list[list] = []

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Answer the next `times` requests that match the regular expression with a status, or cut them off."""
        self.failures.append([re.compile(request), how, times])

    def failure_of(self, request: str) -> int | str | None:
        with self.lock:
            for failure in self.failures:
                if failure[2] > 0 and failure[0].search(request):
                    failure[2] -= 1
                    return failure[1]
        return None


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; the methods below `_ROUTES` each one kind of request."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # The client went away.
            self.close_connection = True

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        request = f"{self.command} {path}"
        self.server.requests.append(f"{request} {self.headers.get('Range', '')}".strip())
        self.failure = self.server.failure_of(request)
        try:
            if isinstance(self.failure, int):
                raise Refused(self.failure, "made to fail")
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    with self.server.lock:
                        content, headers, status = answer(self, **match.groupdict())
                    return self._send(content, headers, status)
            raise Refused(404, f"no such page: {request}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send({"error": refused.message}, headers, refused.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, content: bytes | dict | list, headers: dict[str, str], status: int) -> None:
        if self.failure == CUT and not content:
            self.close_connection = True
            return
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure == CUT:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def _require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, repo: str) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is not None and repository.private:
            self._require_token()
        if repository is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repo: str, revision: str | None) -> Commit:
        commit = self._repository(repo).find(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # --- Repositories and their files ---

    def create(self):
        self._require_token()
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or 'user'}/{wish['name']}"
        status = 409 if name in self.server.repositories else 200
        private = wish.get("private", False) or wish.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private))
        return {"url": f"{self.server.url}/{name}", "name": name}, {}, status

    def validate_yaml(self):
        return {"errors": [], "warnings": []}, {}, 200

    def info(self, repo: str, revision: str | None = None):
        commit = self._commit(repo, revision)
        siblings = []
        for path, blob in commit.files.items():
            lfs = {"size": len(blob.content), "sha256": blob.oid, "pointerSize": 134} if blob.is_large else None
            siblings.append({"rfilename": path, "size": len(blob.content), "blobId": blob.oid, "lfs": lfs})
        private = self.server.repositories[repo].private
        return {"id": repo, "sha": commit.oid, "private": private, "siblings": siblings}, {}, 200

    def tree(self, repo: str, revision: str):
        files = []
        for path, blob in self._commit(repo, revision).files.items():
            file = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.is_large:
                file["lfs"] = {"size": len(blob.content), "oid": blob.oid, "pointerSize": 134}
            files.append(file)
        return files, {}, 200

    def resolve(self, repo: str, revision: str, path: str):
        commit = self._commit(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return b"", {**headers, "X-Error-Code": "EntryNotFound"}, 404
        content = commit.files[path].content
        headers |= {"ETag": f'"{commit.files[path].oid}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if requested is None:
            return content, headers, 200
        first = int(requested[1])
        headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        return content[first:], headers, 206

    # --- Uploads ---

    def preupload(self, repo: str, revision: str):
        self._require_token()
        present = self._commit(repo, revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(_LARGE) else "regular"
            oid = present[path].oid if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}, {}, 200

    def batch(self, repo: str):
        self._require_token()
        self._repository(repo)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.uploads:
                answer["actions"] = {"upload": {"href": f"{self.server.url}/storage/{wanted['oid']}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}, {}, 200

    def store(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        self.server.uploads[oid] = self.body
        return b"", {}, 200

    def commit(self, repo: str, revision: str):
        self._require_token()
        repository = self._repository(repo)
        header, *operations = map(json.loads, self.body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent not in (None, repository.head.oid):
            raise Refused(412, "The branch has moved since `parent_commit`")
        files = dict(repository.head.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            elif operation["key"] == "lfsFile" and value["oid"] in self.server.uploads:
                files[value["path"]] = Blob(self.server.uploads[value["oid"]], True)
            else:
                raise Refused(400, f"cannot commit {operation['key']} {value['path']}")
        commit = repository.add(header["value"]["summary"], files)
        url = f"{self.server.url}/{repo}/commit/{commit.oid}"
        return {"commitUrl": url, "commitOid": commit.oid, "success": True}, {}, 200


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/(?P<oid>\w+)", _Handler.store),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
