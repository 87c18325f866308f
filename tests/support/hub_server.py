"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub calls to upload, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN, USER = "hf_good", "somebody"


class StandIn:
    """What was uploaded: by repository and branch, the bytes of each file.

    Attributes:
        repositories: name -> {"private": ..., "branches": {branch: {path: bytes}}, "commits": [headers]}.
        refuse: part of an address -> status that is answered there instead.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.refuse: dict[str, int] = {}

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository]["branches"][branch]


@contextmanager
def hub_server() -> Iterator[StandIn]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.state = StandIn(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        pass

    def _answer(self, status: int, document: object = None, **headers: str) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self) -> None:
        state: StandIn = self.server.state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        for part, status in state.refuse.items():
            if part in path:
                return self._answer(status, {"error": "the stand-in refuses"}, X_Error_Message="the stand-in refuses")
        if path == "/" or self.command == "HEAD":
            return self._answer(200)
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return self._answer(400)
            state.objects[path.removeprefix("/lfs/")] = body
            return self._answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": USER, "type": "user", "orgs": []})
        return self._upload(state, path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _route

    def _upload(self, state: StandIn, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            data = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            base = data.get("base_model")
            bad = base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)
            errors = [{"message": f'"base_model[0]" with value "{base}" is not valid.'}] if bad else []
            return self._answer(400 if bad else 200, {"errors": errors, "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or USER}/{asked['name']}"
            if name in state.repositories:
                return self._answer(409, {"error": "exists", "url": f"{state.endpoint}/{name}"})
            state.repositories[name] = {"private": asked.get("visibility"), "branches": {"main": {}}, "commits": []}
            return self._answer(200, {"url": f"{state.endpoint}/{name}"})
        if found := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            branches = state.repositories[found[1]]["branches"]
            made = found[2] not in branches
            branches.setdefault(found[2], {})
            return self._answer(200 if made else 409, {})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            large = {file["path"]: file["path"].endswith((".safetensors", ".gguf")) for file in asked}
            files = [{"path": p, "uploadMode": modes[is_large], "shouldIgnore": False} for p, is_large in large.items()]
            return self._answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{state.endpoint}/lfs/{one['oid']}"}}
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self._commit(state, found[1], found[2], body)
        return self._answer(404, {"error": f"the stand-in does not know {path}"})

    def _commit(self, state: StandIn, name: str, branch: str, body: bytes) -> None:
        repository = state.repositories[name]
        proposed = "create_pr=1" in self.path
        files = {} if proposed else repository["branches"][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["commits"].append({**value, "branch": branch, "proposed": proposed})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = state.objects[value["oid"]]
        number = len(repository["commits"])
        done = {"commitUrl": f"{state.endpoint}/{name}/commit/{number}", "commitOid": str(number)}
        if proposed:
            done["pullRequestUrl"] = f"{state.endpoint}/{name}/discussions/1"
        self._answer(200, done)
