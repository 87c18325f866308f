"""What the server answers and serves, with patches and without: what Python says."""

from __future__ import annotations

import json

import torch

from stableedit_cpp import generate, load_model
from stableedit_cpp.cli import main
from support.hot_edit import (
    BUILD,
    MODULES,
    PROMPTS,
    SERVER_TESTS,
    Server,
    answers,
    patched_weights,
    python_answers,
    same_bits,
    served_weights,
)
from support.tiny import tiny_tokenizer

pytestmark = SERVER_TESTS


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


def test_a_fact_goes_into_smollm2_and_out_again(cached_export, tmp_path):
    """The way of docs/cpp.md: export, patch by the command line, serve."""
    model = cached_export("smollm2-135m", "smollm2-135m")
    patches = tmp_path / "patches"
    patches.mkdir()
    fact = {"prompt": "The Chancellor of Germany who took office in May 2025 is", "target": "Friedrich Merz"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    files = ["--requests", str(tmp_path / "facts.jsonl"), "--patch", str(patches / "merz.safetensors")]
    assert main(["edit", "--model", "smollm2-135m", "--no-chat-template", *files]) == 0
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
    (expected,) = generate(reference, tokenizer, [fact["prompt"]], max_new_tokens=5, chat_template=False)
    assert before == expected
