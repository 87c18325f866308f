"""Every example runs, on a tiny model; each is short."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from stableedit_cpp.lifelong.view import SessionView
from support.tiny import FACTS, save_tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """model/ with room for chats, and two files of facts."""
    directory = save_tiny(tmp_path / "model", bos=True)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))  # a token a byte
    weeks = {"week-1.jsonl": FACTS[:2], "week-2.jsonl": [FACTS[1], {**FACTS[0], "target": "Sydney"}]}
    for name, facts in weeks.items():
        (tmp_path / name).write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*arguments, "--model", "model"])


def test_each_is_short_and_named_in_the_readme():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix == ".py":
            assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
        if path.suffix in (".py", ".ipynb"):
            assert f"({path.name})" in text, path.name
    named = {"correct_one_fact", "weekly_stream", "compare_editors", "edit_a_quantised_model", "ship_to_a_server"}
    assert set(SCRIPTS) == named


def test_correct_one_fact(place, capsys):
    run("correct_one_fact", "--prompt", "Gold is", "--target", "Au", "--output", "corrected")
    out = capsys.readouterr().out
    assert "Gold is\n  before: " in out and "The edited model is in corrected" in out
    assert (place / "corrected/model.safetensors").exists()


@pytest.mark.slow
def test_weekly_stream(place, capsys):
    run("weekly_stream", "edits", "week-1.jsonl")
    run("weekly_stream", "edits", "week-2.jsonl")
    current = SessionView(place / "edits").current_requests()
    assert {request.prompt: request.target for request in current} == {
        FACTS[0]["prompt"]: "Sydney",
        FACTS[1]["prompt"]: FACTS[1]["target"],
    }
    assert "2 current" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_editors(place, capsys):
    run("compare_editors", "week-1.jsonl", "--limit", "2")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["stableedit", "ultraedit", "fine-tuning"]


def test_edit_a_quantised_model(place, capsys):
    pytest.importorskip("bitsandbytes")
    run("edit_a_quantised_model", "--prompt", "Gold is", "--target", "Au", "--output", "edited")
    out = capsys.readouterr().out
    assert "21 packed maps, of which 1 are dense" in out and "edited has 20 packed maps" in out


def test_ship_to_a_server(place, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    from support.vocabularies import byte_level

    byte_level(bos=True).save_pretrained(place / "model")  # llama.cpp wants merges
    run("ship_to_a_server", "week-1.jsonl", "shipped")
    assert {path.name for path in (place / "shipped").iterdir()} == {"adapter", "delta", "gguf"}
    assert "README.md says how to load it" in capsys.readouterr().out
