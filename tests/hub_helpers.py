"""A hub of a folder: as much of the Hugging Face hub's HTTP interface as uploads and downloads need.

<root>/<owner>/<name>/<files>    one commit a repository, called `main`
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _give(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._give(json.dumps(value).encode(), status, Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            entry = json.loads(body)
            name = "/".join(filter(None, (entry.get("organization") or "me", entry["name"])))
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self._json({"url": f"http://{self.headers['Host']}/{name}", "id": "1", "name": name})
        elif self.path.endswith("/validate-yaml"):
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            files = json.loads(body)["files"]
            self._json({"files": [{"path": each["path"]} | mode for each in files]})
        else:
            repo = re.fullmatch(r"/api/models/(.+)/commit/main", self.path)
            assert repo is not None, self.path
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    file = self.root / repo[1] / entry["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(entry["value"]["content"]))
            url = f"http://{self.headers['Host']}/{repo[1]}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/(.+?)(/(revision|tree)/[^/]+(/.+)?)?", path):
            folder = self.root / found[1]
            files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
            if found[3] == "tree":
                below = (found[4] or "").lstrip("/")
                sizes = {n: f.stat().st_size for n, f in files.items() if n.startswith(below)}
                entry = {"type": "file", "oid": COMMIT}
                if sizes:
                    self._json([entry | {"path": n, "size": size} for n, size in sizes.items()])
                else:
                    self._give(b"", 404, X_Error_Code="EntryNotFound")
                return
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings})
            return
        found = re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path)
        file = self.root / found[1] / found[2] if found else self.root
        if not file.is_file():
            self._give(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        body = file.read_bytes()
        tag = f'"{hashlib.sha1(body).hexdigest()}"'
        self._give(body, ETag=tag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """The address of a hub of ``root``, for ``HF_ENDPOINT``."""
    handler = type("Handler", (_Handler,), {"root": root})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
