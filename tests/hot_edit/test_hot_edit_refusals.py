"""What the server refuses, with a sentence and without a change: requests, patches, options, strangers."""

from __future__ import annotations

import json
import os
import socket
import subprocess

import pytest
import torch

from stableedit_cpp import core
from support.hot_edit import (
    BUILD,
    MODULES,
    SERVER_TESTS,
    Refused,
    Server,
    export_model,
    mutate,
    same_bits,
    served_weights,
)

pytestmark = SERVER_TESTS


REFUSALS = [
    ("POST", "/generate", b"", 400, "not valid JSON"),
    ("POST", "/generate", b"[1]", 400, "must be a JSON object"),
    ("POST", "/generate", b"[" * 60000, 400, "not valid JSON"),
    ("POST", "/generate", b'{"prompt": "\xff"}', 400, "not valid JSON"),
    ("POST", "/generate", b'{"prompt": 1e999}', 400, "number that is too large"),
    ("POST", "/generate", b"{}", 400, 'lacks "prompt"'),
    ("POST", "/generate", b'{"prompt": 1}', 400, "must be a text"),
    ("POST", "/generate", b'{"prompt": ""}', 400, "no tokens"),
    ("POST", "/generate", b'{"prompt": "a", "max_token": 1}', 400, '"max_token"'),
    ("POST", "/generate", b'{"prompt": "a", "max_tokens": 0}', 400, "whole number from 1 to 64"),
    ("POST", "/generate", b'{"prompt": "a", "max_tokens": 1.5}', 400, "whole number"),
    ("POST", "/generate", b'{"prompt": "a", "max_tokens": 18446744073709551615}', 400, "whole number"),
    ("POST", "/generate", b'{"prompt": "' + b"a" * 64 + b'"}', 400, "64 tokens"),
    ("POST", "/generate", b'{"prompt": "' + b"a" * 1000 + b'"}', 400, "1000 bytes"),
    ("POST", "/generate", b'{"prompt": "' + b"a" * 70000 + b'"}', 413, "too large"),
    ("POST", "/patches", b"{}", 400, 'lacks "file"'),
    ("POST", "/patches", b'{"file": "missing.safetensors"}', 404, "no file missing.safetensors"),
    ("POST", "/patches", b'{"file": "../patches/a.safetensors"}', 400, "name of a file"),
    ("POST", "/patches", b'{"file": "/etc/passwd"}', 400, "name of a file"),
    ("POST", "/patches", b'{"file": ".."}', 400, "name of a file"),
    ("POST", "/patches", b'{"file": "a.safetensors\\u0000"}', 400, "name of a file"),
    ("POST", "/patches", b'{"file": "link.safetensors"}', 403, "symbolic link"),
    ("POST", "/patches", b'{"file": "directory"}', 403, "not a regular file"),
    ("POST", "/patches", b'{"file": "fifo"}', 403, "not a regular file"),
    ("POST", "/patches", b'{"file": "large.safetensors"}', 413, "more than the limit"),
    ("POST", "/patches", b'{"file": "cut.safetensors"}', 422, "cut.safetensors"),
    ("POST", "/patches", b'{"file": "alien.safetensors"}', 422, "another model"),
    ("POST", "/patches", b'{"file": "elsewhere.safetensors"}', 422, "model.layers.9.mlp.down_proj"),
    ("POST", "/patches", b'{"file": "shape.safetensors"}', 422, "does not fit"),
    ("POST", "/patches", b'{"file": "nan.safetensors"}', 422, "finite"),
    ("POST", "/patches", b'{"file": "zero.safetensors"}', 422, "a module with a zero byte"),
    ("POST", "/patches", b'{"file": "a.safetensors", "id": "a/b"}', 400, "not 'a/b'"),
    ("POST", "/patches", b'{"file": "a.safetensors", "id": "a\\nb"}', 400, "not 'a b'"),
    ("POST", "/patches", b'{"file": "a.safetensors", "id": ""}', 400, "not ''"),
    ("DELETE", "/patches/a", None, 404, "no patch 'a'"),
    ("DELETE", "/patches/..%2F..%2Fetc", None, 404, "there is no"),
    ("GET", "/weights/lm_head", None, 404, "no editable module"),
    ("GET", "/nothing", None, 404, "the endpoints are"),
    ("PUT", "/generate", b"{}", 404, "there is no PUT"),
    ("OPTIONS", "/patches", None, 404, "there is no OPTIONS"),
    ("GET", "/" + "a" * 9000, None, 414, "too long"),
]


def test_bad_requests_get_a_sentence_and_change_nothing(exported, patches, tmp_path, digest):
    broken = tmp_path / "patches"
    broken.mkdir()
    content = (patches / "a.safetensors").read_bytes()
    (broken / "a.safetensors").write_bytes(content)
    (broken / "cut.safetensors").write_bytes(content[:-1])
    (broken / "link.safetensors").symlink_to(patches / "a.safetensors")
    (broken / "directory").mkdir()
    os.mkfifo(broken / "fifo")
    with open(broken / "large.safetensors", "wb") as file:
        file.truncate((1 << 20) + 1)
    change = core.WeightChange(torch.ones(16, 24))
    for name, patch in {
        "alien": core.Patch({MODULES[0]: change}, id="x", base_model="gpt", base_digest="0" * 64),
        "elsewhere": core.Patch({"model.layers.9.mlp.down_proj": change}, id="x"),
        "shape": core.Patch({MODULES[0]: core.WeightChange(torch.ones(16, 25))}, id="x"),
        "nan": core.Patch({MODULES[0]: core.WeightChange(torch.full((16, 24), float("nan")))}, id="x"),
        "zero": core.Patch({MODULES[0] + "\0x": change}, id="x"),
        "dated": core.Patch({MODULES[0]: change}, id="2026-11-23T01:02:03+0000"),
    }.items():
        core.save_patch(broken / f"{name}.safetensors", patch)
    options = {"model": exported, "patches": broken, "state": tmp_path / "state", "max_patch_mb": 1}
    with Server(BUILD / "hot_edit_server", **options) as server:
        before = served_weights(server)
        for method, path, body, status, part in REFUSALS:
            seen, answer = server.send(method, path, body)
            sentence = json.loads(answer).get("error", "")
            assert (seen, part in sentence) == (status, True), f"{method} {path} {body!r:.80}: {seen} {answer}"
            assert "\n" not in sentence
        status, answer = server.send("POST", "/generate", b'{"prompt": "a"}', Content_Type="text/plain")
        assert status == 415 and "application/json" in json.loads(answer)["error"]
        status, answer = server.send("POST", "/generate", b"zip", Content_Encoding="gzip")
        assert status == 415 and "compressed" in json.loads(answer)["error"]
        assert server.patches() == [] and same_bits(before, served_weights(server))
        assert server.add("dated.safetensors")["id"] == "dated"
        server.add("a.safetensors")
        with pytest.raises(Refused, match="409: there is a patch 'a' already"):
            server.add("a.safetensors")


def test_bodies_of_unknown_length_are_refused_unread(server):
    for head in ("POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked", "POST /generate HTTP/1.1"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(f"{head}\r\nHost: localhost\r\nContent-Type: application/json\r\n\r\n".encode())
            answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 411 ") and b"'Content-Length'" in answer


def test_what_a_patch_says_of_itself_cannot_exhaust_the_stack(exported, tmp_path):
    directory = tmp_path / "patches"
    directory.mkdir()
    change = core.WeightChange(torch.ones(16, 24))
    requests = {"deep": "[" * 1_000_000 + "]" * 1_000_000, "nested": "[[1]]", "text": "three facts"}
    for name, text in requests.items():
        core.save_patch(directory / f"{name}.safetensors", core.Patch({MODULES[0]: change}, id=name, requests=text))
    options = {"model": exported, "patches": directory, "state": tmp_path / "state"}
    with Server(BUILD / "hot_edit_server", **options) as server:
        for name in requests:
            server.add(f"{name}.safetensors")
        listed = {patch["id"]: patch["requests"] for patch in server.call("GET", "/patches")["patches"]}
        assert listed == {"deep": requests["deep"], "nested": [[1]], "text": "three facts"}
        assert server.stop() == 0


def test_the_token(options, tmp_path):
    (tmp_path / "token").write_text("correct horse battery staple\n".replace(" ", "-"))
    with Server(BUILD / "hot_edit_server", **options, token_file=tmp_path / "token") as server:
        assert server.call("GET", "/health")["status"] == "ok"
        for token in (None, "", "correct-horse-battery-stapl", "correct-horse-battery-stapleX"):
            server.token = token
            for method, path in (("POST", "/generate"), ("GET", "/patches"), ("GET", "/metrics"), ("GET", "/nothing")):
                status, answer = server.send(method, path, b'{"prompt": "a"}' if method == "POST" else None)
                assert status == 401 and "Authorization" in json.loads(answer)["error"]
        server.token = "correct-horse-battery-staple"
        assert server.generate("a", 1)["tokens"]


def test_it_does_not_start_with_wrong_options(options, server, tmp_path):
    def reason(**changes) -> str:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**options, **changes}.items()]
        done = subprocess.run([BUILD / "hot_edit_server", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("hot_edit_server: error: ") and done.stderr.count("\n") == 1
        return done.stderr

    assert "in use by another server" in reason()
    assert "give a --token-file" in reason(host="0.0.0.0")
    assert "--port 99999 must be a number" in reason(port=99999)
    assert "see --help" in reason(nonsense=1)
    assert "No such file" in reason(model=tmp_path / "nowhere")
    assert "at least 16 characters" in reason(token_file=os.devnull, state=tmp_path / "other")
    assert "is it in use?" in reason(port=server.port, state=tmp_path / "other")
    assert "No such file" in reason(patches=tmp_path / "nowhere", state=tmp_path / "other")
    server.add("a.safetensors")
    server.stop()
    (stored,) = options["state"].iterdir()
    stored.write_bytes(stored.read_bytes()[:-1])
    assert str(stored) in reason()


def test_help_has_an_example():
    done = subprocess.run([BUILD / "hot_edit_server", "--help"], capture_output=True, text=True, check=True)
    assert "example:" in done.stdout and "--token-file" in done.stdout


def test_mutated_requests(exported, patches, tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    options = {"model": exported, "patches": allowed, "state": tmp_path / "state"}
    with Server(BUILD / "hot_edit_server", **options) as server:
        before = served_weights(server)
        seen = mutate.run(server, allowed, patches / "a.safetensors", count=400)
        assert sum(seen.values()) == 400 and {400, 422} <= {status for _, status in seen}
        assert same_bits(before, served_weights(server))
        assert server.stop() == 0


def test_export_refuses_what_it_cannot_export(tmp_path, capsys):
    assert export_model.main(["--model", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "cannot load the model" in capsys.readouterr().err
    assert export_model.main(["--model", "x", "--output", str(tmp_path)]) == 2
    assert "name a new directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
