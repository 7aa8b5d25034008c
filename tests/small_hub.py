"""A small server that speaks the hub's endpoints for making, filling and reading repositories.

As the hub does, it takes small texts in the commit and everything else by Git LFS, asks for a token
where something is written, and names the reason of a refusal in ``X-Error-Code``.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_this_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)


class SmallHub:
    """What is on it, and where it listens."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.address = ""

    @contextlib.contextmanager
    def listening(self) -> Iterator["SmallHub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def path_only(self) -> str:
        return unquote(urlsplit(self.path).path)

    def do_POST(self) -> None:
        sent, path = self.body(), self.path_only
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                url = f"{self.hub.address}/{name}"
                return self.answer({"error": "You already created this repo", "url": url}, 409)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private)
            return self.answer({"url": f"{self.hub.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
                for one in json.loads(sent)["objects"]
            ]
            return self.answer({"objects": objects, "transfer": "basic"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not found or found[1] not in self.hub.repositories:
            return self.refuse(404, "RepoNotFound")
        repository = self.hub.repositories[found[1]]
        if found[2] == "preupload":
            modes = {True: "regular", False: "lfs"}
            files = [
                {
                    "path": one["path"],
                    "uploadMode": modes[one["path"].endswith((".md", ".json"))],
                    "shouldIgnore": False,
                }
                for one in json.loads(sent)["files"]
            ]
            return self.answer({"files": files})
        for line in sent.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.large[value["oid"]]
        url = f"{self.hub.address}/{found[1]}/commit/{COMMIT}"
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_PUT(self) -> None:
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path_only.split("/")[-1]
        self.hub.large[self.path_only.split("/")[-1]] = content
        self.answer(b"")

    def do_GET(self) -> None:
        path = self.path_only
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)/(tree|resolve)/[^/]+/?(.*)", path)
        repository = self.hub.repositories.get(found[1]) if found else None
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not found or repository is None or (repository.private and not known):
            return self.refuse(404 if known else 401, "RepoNotFound")
        if found[2] == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(content), "oid": name}
                for name, content in repository.files.items()
            ]
            return self.answer(listing)
        if found[3] not in repository.files:
            return self.refuse(404, "EntryNotFound")
        content = repository.files[found[3]]
        digest = hashlib.sha256(content).hexdigest()
        return self.answer(content, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET
