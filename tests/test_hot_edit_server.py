"""The server of cpp/examples/hot_edit_server with a tiny model: endpoints, refusals, changes under load, kill -9."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stableedit_cpp import core, generate, load_model
from stableedit_cpp.cli import main
from stableedit_cpp.model.modules import find_modules
from support.processes import one_process_at_a_time
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "cpp/examples/hot_edit_server"
sys.path.insert(0, str(EXAMPLE))
import export_model  # noqa: E402
import mutate  # noqa: E402
from client import Refused, Server  # noqa: E402

# Where `make test-cpp` builds; another place can be named.
BUILD = Path(os.environ.get("STABLEEDIT_BUILD_DIR", ROOT / "build/editable")) / "cpp/examples/hot_edit_server"
MODULES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
PROMPTS = ["The capital of Peru:", "Gold", "2 + 2 =", "Österreich, 日本", "x", "Snow is white and"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUILD / "hot_edit_server").exists(),
        reason=f"no hot_edit_server in {BUILD}; `make test-cpp` builds it where its libraries are installed",
    ),
]


@pytest.fixture(scope="module")
def cached_export(request) -> Callable[[str, str], Path]:
    """Exports a model (name, what to load) and keeps it between runs: compiling takes half a minute, or minutes."""
    sources = [EXAMPLE / "export_model.py", ROOT / "tests/support/tiny.py"]
    key = hashlib.sha256(torch.__version__.encode() + b"".join(source.read_bytes() for source in sources)).hexdigest()

    def cached(name: str, source: str) -> Path:
        directory = Path(request.config.cache.mkdir("hot_edit_server")) / f"{name}-{key[:16]}"
        with one_process_at_a_time(directory):
            if not directory.exists():
                assert export_model.main(["--model", source, "--output", str(directory), "--max-length", "64"]) == 0
        return directory

    return cached


@pytest.fixture(scope="module")
def exported(cached_export, tmp_path_factory) -> Path:
    source = save_tiny(tmp_path_factory.mktemp("tiny"))
    return cached_export("tiny", str(source))


@pytest.fixture(scope="module")
def digest(exported) -> str:
    return json.loads((exported / "manifest.json").read_text())["model_digest"]


@pytest.fixture(scope="module")
def patches(tmp_path_factory, digest) -> Path:
    """Files a, b and c: low-rank changes, one of them dense, that overlap in their modules."""
    directory = tmp_path_factory.mktemp("patches")
    generator = torch.Generator().manual_seed(0)

    def low_rank(scale: float) -> core.WeightChange:
        left, right = torch.randn(16, 2, generator=generator), torch.randn(2, 24, generator=generator)
        return core.WeightChange(core.LowRankUpdate(scale * left, right))

    dense = core.WeightChange(0.5 * torch.randn(16, 24, generator=generator))
    changes = {
        "a": {MODULES[0]: low_rank(1.0), MODULES[2]: low_rank(1.0)},
        "b": {MODULES[1]: low_rank(1.0), MODULES[2]: dense},
        "c": {MODULES[2]: low_rank(2.0)},
    }
    for name, modules in changes.items():
        patch = core.Patch(modules, id=name, base_model="tiny", base_digest=digest, requests='{"edits": 1}')
        core.save_patch(directory / f"{name}.safetensors", patch)
    return directory


@pytest.fixture
def options(exported, patches, tmp_path) -> dict:
    return {"model": exported, "patches": patches, "state": tmp_path / "state"}


@pytest.fixture
def server(options):
    with Server(BUILD / "hot_edit_server", **options) as running:
        yield running


def patched_weights(patches: Path, names: str) -> dict[str, torch.Tensor]:
    """The weights with some patches, added one after the other in Python."""
    weights = {module.name: module.weight.detach() for module in find_modules(tiny_model("llama"), MODULES)}
    for name in names:
        patch = core.load_patch(patches / f"{name}.safetensors")
        patch.add_to({module: weights[module] for module in patch.modules})
    return weights


def python_answers(patches: Path, names: str, max_tokens: int) -> list[list[int]]:
    """Greedy answers of the model in Python, with some patches."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for name, weight in patched_weights(patches, names).items():
        model.get_submodule(name).weight.data.copy_(weight)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            full = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answers.append([token for token in full.tolist() if token != model.config.eos_token_id])
    return answers


def answers(server: Server, max_tokens: int = 8) -> list[list[int]]:
    return [server.generate(prompt, max_tokens)["tokens"] for prompt in PROMPTS]


def served_weights(server: Server) -> dict[str, torch.Tensor]:
    weights = {}
    for module in MODULES:
        tensors, _ = core.parse_safetensors(server.weight(module))
        weights[module] = tensors[f"{module}.weight"]
    return weights


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in MODULES)


def test_answers_and_weights_are_those_of_python(server, patches):
    assert answers(server) == python_answers(patches, "", 8)
    for add, applied in (("a", "a"), ("b", "ab"), ("c", "abc")):
        change = server.add(f"{add}.safetensors")
        assert change["patches"] == list(applied) == server.patches()
        assert answers(server) == python_answers(patches, applied, 8)
    close = patched_weights(patches, "abc")
    assert all(torch.allclose(weight, close[name], atol=1e-6) for name, weight in served_weights(server).items())


def test_weights_depend_on_the_applied_patches_only(server, options):
    start = served_weights(server)
    assert same_bits(start, patched_weights(options["patches"], ""))
    server.add("a.safetensors")
    server.add("c.safetensors")
    without_b = served_weights(server)
    server.remove("c")
    server.add("b.safetensors")
    server.add("c.safetensors")
    assert not same_bits(served_weights(server), without_b)
    server.remove("b")  # the first, middle and last of several: in the end as if they had never been there
    assert same_bits(served_weights(server), without_b)
    server.stop()
    server.start()
    assert server.patches() == ["a", "c"]
    assert same_bits(served_weights(server), without_b)
    server.remove("a")
    server.remove("c")
    assert same_bits(served_weights(server), start)
    assert list(options["state"].iterdir()) == []


def test_what_the_endpoints_tell(server, digest):
    health = server.call("GET", "/health")
    assert health["status"] == "ok" and health["model_digest"] == digest
    change = server.add("a.safetensors", id="other.name-1")
    assert change["modules"] == [MODULES[0], MODULES[2]]
    assert 0 < change["pause_seconds"] < change["prepare_seconds"] < 1
    (listed,) = server.call("GET", "/patches")["patches"]
    assert listed["id"] == "other.name-1" and listed["requests"] == {"edits": 1}
    answer = server.generate(PROMPTS[0], max_tokens=3)
    assert answer["patches"] == ["other.name-1"] and answer["version"] == change["version"] == 1
    assert len(answer["tokens"]) == 3 and answer["finish"] == "length"
    assert answer["text"] == tiny_tokenizer().decode(answer["tokens"])
    status, text = server.send("GET", "/metrics")
    lines = text.decode().splitlines()
    assert status == 200
    assert 'hot_edit_requests_total{endpoint="/patches",status="201"} 1' in lines
    assert "hot_edit_generation_seconds_count 1" in lines and "hot_edit_patches 1" in lines
    for line in lines:
        assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


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


def test_the_queue_is_bounded(options):
    with Server(BUILD / "hot_edit_server", **options, concurrency=1, queue=1) as server:
        expected = server.generate("a", 60)["tokens"]
        refused: list[Refused] = []

        def client() -> None:
            for _ in range(10):
                try:
                    assert server.generate("a", 60)["tokens"] == expected
                except Refused as refusal:
                    refused.append(refusal)

        clients = [threading.Thread(target=client) for _ in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert refused and {refusal.status for refusal in refused} == {503}
        assert "too many generations are waiting" in refused[0].sentence
        assert server.generate("a", 60)["tokens"] == expected


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


def test_generations_under_changes_see_one_version_each(server):
    quiet = {}
    for names in ("", "a", "ab"):
        for name in names[-1:]:
            server.add(f"{name}.safetensors")
        quiet[tuple(names)] = answers(server)
    server.remove("b")
    server.remove("a")
    start = served_weights(server)
    failures: list[str] = []
    seen: set[tuple[str, ...]] = set()
    done = threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not done.is_set():
                index = rng.randrange(len(PROMPTS))
                answer = server.generate(PROMPTS[index], 8)
                version = tuple(answer["patches"])
                seen.add(version)
                if answer["tokens"] != quiet[version][index]:
                    failures.append(f"{PROMPTS[index]} with {version}: {answer['tokens']}")
        except Exception as error:
            failures.append(repr(error))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in clients:
        thread.start()
    for _ in range(15):
        for change in (server.add, server.remove):
            change("a.safetensors" if change == server.add else "a")
        server.add("a.safetensors")
        server.add("b.safetensors")
        server.remove("b")
        server.remove("a")
    done.set()
    for thread in clients:
        thread.join()
    assert failures == []
    assert seen == set(quiet)
    assert same_bits(served_weights(server), start)


def test_kill_9_loses_nothing_that_was_acknowledged(server, options):
    rng = random.Random(0)
    bits: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for _ in range(20):
        acknowledged, attempted = server.patches(), None
        killer = threading.Timer(rng.uniform(0.0, 0.15), server.kill)
        killer.start()
        try:
            while True:
                name = rng.choice("abc")
                attempted = [n for n in acknowledged if n != name] + [name] * (name not in acknowledged)
                change = server.remove(name) if name in acknowledged else server.add(f"{name}.safetensors")
                acknowledged = change["patches"]
                assert acknowledged == attempted
        except OSError:  # the connection broke
            killer.join()
        server.start()
        found = server.patches()
        assert found in (acknowledged, attempted)  # what was in flight has happened as a whole or not at all
        weights = served_weights(server)
        assert same_bits(weights, bits.setdefault(tuple(found), weights))
        assert [file.name for file in options["state"].glob(".*")] == []
    for name in server.patches():
        server.remove(name)
    assert same_bits(served_weights(server), patched_weights(options["patches"], ""))


def test_requests_that_have_begun_are_answered_at_the_end(options):
    with Server(BUILD / "hot_edit_server", **options) as server:
        expected = server.generate("a", 60)["tokens"]
        results = []

        def client() -> None:
            with contextlib.suppress(OSError):  # those that came too late
                while True:
                    results.append(server.generate("a", 60)["tokens"])

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        present = 0
        while present < 4:
            metrics = server.send("GET", "/metrics")[1].decode()
            present = int(re.search(r"^hot_edit_generations (\d+)$", metrics, re.MULTILINE).group(1))
        assert server.stop() == 0
        for thread in clients:
            thread.join()
    assert len(results) >= present and all(tokens == expected for tokens in results)


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


def test_a_fact_goes_into_smollm2_and_out_again(cached_export, tmp_path):
    """The way of docs/cpp.md: export, patch by the command line, serve."""
    model = cached_export("smollm2-135m", "smollm2-135m")
    patches = tmp_path / "patches"
    patches.mkdir()
    fact = {"prompt": "The Chancellor of Germany who took office in May 2025 is", "target": "Friedrich Merz"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    (tmp_path / "config.json").write_text('{"turn_size": 1, "max_passes": 12, "step_size": 1.2e-3, "ridge": 300.0}')
    files = {"--requests": tmp_path / "facts.jsonl", "--config": tmp_path / "config.json"}
    files["--patch"] = patches / "merz.safetensors"
    options = [text for option, file in files.items() for text in (option, str(file))]
    assert main(["edit", "--model", "smollm2-135m", *options]) == 0
    with Server(BUILD / "hot_edit_server", model=model, patches=patches, state=tmp_path / "state") as server:
        before = server.generate(fact["prompt"], 5)["text"]
        assert "Merz" not in before
        change = server.add("merz.safetensors")
        assert change["id"] == "merz"
        assert server.generate(fact["prompt"], 5)["text"].startswith(" Friedrich Merz")
        server.remove("merz")
        assert server.generate(fact["prompt"], 5)["text"] == before
        assert server.stop() == 0

    reference, tokenizer = load_model("smollm2-135m")
    (expected,) = generate(reference, tokenizer, [fact["prompt"]], max_new_tokens=5)
    assert before == expected
