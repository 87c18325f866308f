"""Starts hot_edit_server and talks to it; needs nothing but Python.

with Server("build/server/hot_edit_server", model="exported", patches="patches", state="state") as server:
    print(server.generate("The capital of Australia is")["text"])
    server.add("canberra.safetensors")
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
from pathlib import Path

__all__ = ["Refused", "Server"]


class Refused(Exception):
    """The server answered with an error: its status and its sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(f"{status}: {sentence}")
        self.status, self.sentence = status, sentence


class Server:
    """A server process on a free port of this machine; ends with the ``with`` block."""

    def __init__(self, binary: str | Path, *, model: str | Path, patches: str | Path, state: str | Path, **options):
        self.token: str | None = None
        self.timeout = 300.0
        arguments = {"model": model, "patches": patches, "state": state, "port": 0, **options}
        self._command = [str(binary)]
        for name, value in arguments.items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        match = re.search(r"http://[^:]+:(\d+)", line)
        if not match:
            raise RuntimeError(f"the server did not start (status {self.process.wait()}): {line or 'see its message'}")
        self.port = int(match.group(1))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self) -> int:
        """SIGTERM: requests that have begun are answered first. Returns the exit status."""
        self.process.terminate()
        return self._wait()

    def kill(self) -> int:
        """SIGKILL, which no process can prepare for."""
        self.process.kill()
        return self._wait()

    def _wait(self) -> int:
        status = self.process.wait(timeout=60)
        self.process.stdout.close()
        return status

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """(status, body) of one request; the body is sent as it is. Raises OSError where the connection breaks."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"the connection broke: {error!r}") from None
        finally:
            connection.close()

    def call(self, method: str, path: str, **members):
        """The JSON that the server answers with. Raises Refused for an error."""
        status, answer = self.send(method, path, json.dumps(members).encode() if members else None)
        document = json.loads(answer)
        if status >= 400:
            raise Refused(status, document["error"])
        return document

    def generate(self, prompt: str, max_tokens: int = 16) -> dict:
        return self.call("POST", "/generate", prompt=prompt, max_tokens=max_tokens)

    def add(self, file: str, **members) -> dict:
        return self.call("POST", "/patches", file=file, **members)

    def remove(self, patch: str) -> dict:
        return self.call("DELETE", f"/patches/{patch}")

    def patches(self) -> list[str]:
        return [patch["id"] for patch in self.call("GET", "/patches")["patches"]]

    def weight(self, module: str) -> bytes:
        """The weight as it is served now, a safetensors file."""
        status, answer = self.send("GET", f"/weights/{module}")
        if status != 200:
            raise Refused(status, json.loads(answer)["error"])
        return answer
