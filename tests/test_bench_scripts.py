"""The scripts of bench/: each says what it takes, and all but the server's run, on a tiny model and little data."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stableedit_cpp import StableEdit, StableEditConfig, load_model, read_requests
from support.exports import TAKES
from support.results import write_run
from support.streams import MODULES, record
from support.tiny import save_tiny
from support.vocabularies import byte_level

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parent.parent / "bench"
HELPERS = ("common", "llama_cpp", "published", "published_math", "roots", "synthetic", "workload")
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if path.stem not in HELPERS)


@pytest.fixture(scope="module")
def scripts():
    """By name. Their own names are common ones (``stream``, ``capture``), so they are forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCH:
                del sys.modules[name]
        sys.path[:] = path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, the same edited, and data sets under the names that the scripts look for."""
    place = tmp_path_factory.mktemp("bench")
    save_tiny(place / "model")
    save_tiny(place / "model with merges")
    byte_level().save_pretrained(place / "model with merges")
    (place / "zsre").mkdir()
    for part, begin in (("edit", 0), ("train", 1000)):
        records = [record(begin + index) for index in range(40)]
        (place / "zsre" / f"zsre_{part}_5k.json").write_text(json.dumps(records))
    (place / "entityquestions").mkdir()
    with gzip.open(place / "entityquestions" / "stream_train_20k.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": "Which river?", "ans": "ab"}) + "\n" for _ in range(4))
    (place / "downstream").mkdir()
    (place / "downstream" / "wikitext2_test_raw.txt").write_text(
        "A river runs to the sea , and the sea is wide .\n" * 40
    )
    model, tokenizer = load_model(place / "model")
    facts = read_requests(place / "zsre" / "zsre_edit_5k.json", 13)
    StableEdit(model, tokenizer, StableEditConfig.one_pass(edit_modules=MODULES, **TAKES)).edit(facts, progress=False)
    model.save_pretrained(place / "edited")
    tokenizer.save_pretrained(place / "edited")
    return place


def call(script: ModuleType, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(scripts, name, monkeypatch, capsys):
    if name == "charts":
        pytest.importorskip("matplotlib", reason="charts need the extra 'report'")
    with pytest.raises(SystemExit) as end:
        call(scripts(name), monkeypatch, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text and f"python bench/{name}.py" in text


def test_the_readme_names_every_script():
    text = (BENCH / "README.md").read_text(encoding="utf-8")
    assert [name for name in (*SCRIPTS, "published") if f"{name}.py" not in text] == []


TINY = ["--model", "{place}/model", "--data", "{place}", "--edit-modules", *MODULES]
RUNS = {
    "capture": ("over_limit", [*TINY, "--requests", 4, "--repeats", 1]),
    "closed_loop": ("settings_done", [*TINY, "--edits", 20, "--warm-up", 10, "--settings", "closed-loop"]),
    "data_parallel": ("results", [*TINY, "--preset", "one-pass", "--edits", 12, "--processes", 1, 2]),
    "device_map": ("same_bits", [*TINY, "--edits", 8]),
    "dry_run": ("records_per_second", ["--records", 2000, "--turn-size", 50]),
    "editing_math": (
        "speedup_late",
        ["--shape", "smollm2-135m", "--modules", 1, "--rows", 40, "--turns", 1, "--exact-turns", 1],
    ),
    "evaluation": ("identical_scores", [*TINY, "--requests", 6, "--edits", 2, "--evaluations", 2]),
    "large_model": (
        "mathematics_share",
        [
            *TINY[2:4],
            "--tokenizer",
            "{place}/model",
            "--config",
            "tiny",
            "--requests",
            4,
            "--turns",
            2,
            "--base-rows",
            99,
        ],
    ),
    "located_targets": ("speedup", ["--model", "{place}/model", "--data", "{place}", "--requests", 3, "--steps", 3]),
    "gguf_answers": (
        "same_answers",
        ["--model", "{place}/model with merges", *TINY[2:], "--requests", 2, "--length", 3],
    ),
    "lora_rank": ("chosen", [*TINY, "--edited", "{place}/edited", "--requests", 8, "--ranks", 2, 4]),
    "mixture": (
        "edited",
        [
            *TINY[2:4],
            "--steps",
            3,
            "--batch",
            2,
            "--width",
            16,
            "--vocabulary",
            300,
            "--edits",
            3,
            "--turn-size",
            2,
        ],
    ),
    "past_keys": ("speedup", ["--shape", "smollm2-135m", "--rows", 8, "--turns", 1, "--fresh-turns", 1, "--ranks", 4]),
    "plan": ("within_aims", [*TINY, "--runs", "one pass", "--share", 0.3]),
    "reading": ("json", ["--records", 1000]),
    "refresh": ("longest_over_median", [*TINY, "--edits", 20, "--warm-up", 10]),
    "rivals_math": (
        "hypernetwork_gradient_speedup",
        ["--key-dim", 64, "--value-dim", 16, "--edits", 4, "--rows", 6, "--loss-rows", 9, "--sketch-rank", 4],
    ),
    "scaling": ("decompositions", ["--turns", 20, "--key-dim", 16, "--value-dim", 8, "--rows", 8]),
    "session_damage": ("detected", ["--count", 4]),
    "session_kills": ("bits_equal", ["--kills", 2, "--turns", 8, "--warm-up", 2]),
    "session_revert": ("back_share", [*TINY, "--edits", 20, "--warm-up", 10, "--reverts", 2]),
    "stream": ("scores", [*TINY, "--edits", 20, "--warm-up", 10, "--turn-size", 10, "--score"]),
    "take": ("rows", [*TINY[:4], "--rows", "zsre-raw", "--edits", 8, "--skip", 2, "--sample", 4]),
    "tensor_parallel": (
        "float64",
        [*TINY[2:4], "--tokenizer", "{place}/model", "--config", "tiny", "--requests", 4, "--turns", 2],
    ),
    "threads": (
        "same_weights",
        [*TINY, "--edits", 4, "--turn-size", 2, "--busy", 1, "--rounds", 1, "--ways", "torch's own", "stableedit"],
    ),
    "whitening": ("fastest", ["--dim", 32, "--repeats", 1]),
}


def test_all_run_but_those_that_need_more():
    assert set(SCRIPTS) - set(RUNS) == {
        "charts",
        "gpu",
        "quantised",
        "rivals",
        "server",
        "two_million",
        "ultraeditbench",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so all would run")
def test_gpu_says_that_there_is_none(scripts, monkeypatch, tmp_path, capsys):
    call(scripts("gpu"), monkeypatch, "--output", tmp_path / "gpu")
    assert capsys.readouterr().out.startswith("There is no CUDA device here")
    assert not (tmp_path / "gpu").exists()


def test_gpu_asks_for_what_the_scripts_take(scripts, monkeypatch, tmp_path):
    """Whose parsers see every command that it would run."""

    class Parsed(Exception):
        pass

    def parsed(parser: argparse.ArgumentParser) -> None:
        options = real(parser)
        assert options.device == "cuda" and Path(options.json).parent == tmp_path
        raise Parsed

    gpu, real = scripts("gpu"), argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for name in (*gpu.SCRIPTS, *gpu.WITH_DATA):
        _, script, *arguments = gpu.command(name, "data", tmp_path)
        with pytest.raises(Parsed):
            call(scripts(Path(script).stem), monkeypatch, *arguments)


@pytest.mark.parametrize("name", RUNS)
def test_a_tiny_run(scripts, place, tmp_path, monkeypatch, name):
    if name == "lora_rank":
        pytest.importorskip("peft", reason="a LoRA adapter is loaded by peft")
    key, arguments = RUNS[name]
    arguments = [str(argument).format(place=place) for argument in arguments]
    call(scripts(name), monkeypatch, *arguments, "--json", tmp_path / "result.json")
    document = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert document["benchmark"] == name
    assert document["machine"]["torch"]
    assert document[key] not in (None, False, {}, [])


def test_a_mixture_is_trained_once(scripts, place, tmp_path, monkeypatch):
    script = scripts("mixture")
    options = {"data": place, "save": tmp_path, "steps": 2, "batch": 2, "vocabulary": 300, "width": 16}
    model, _, trained = script.trained_model(argparse.Namespace(**options), torch.device("cpu"))
    monkeypatch.setattr(script, "train", None)
    kept, _, again = script.trained_model(argparse.Namespace(**options), torch.device("cpu"))
    assert again == trained and trained["steps"] == 2
    parts = zip(model.state_dict().values(), kept.state_dict().values(), strict=True)
    assert all(torch.equal(part, same) for part, same in parts)
    with pytest.raises(SystemExit, match="has a model with --width 16"):
        script.trained_model(argparse.Namespace(**options | {"width": 24}), torch.device("cpu"))


def test_rivals_of_made_up_runs_fill_a_page(scripts, tmp_path, monkeypatch, capsys):
    script = scripts("rivals")
    for editor, level in (("stableedit", 0.8), ("memit", 0.4)):
        write_run(tmp_path / "runs" / editor, editor, level=level)
    page, kept = tmp_path / "page.md", tmp_path / "rivals.json"
    page.write_text(f"before\n\n{script.MARKS[0]}\nold\n{script.MARKS[1]}\n\nafter\n")
    call(script, monkeypatch, "--runs", tmp_path / "runs", "--json", kept, "--page", page)
    document = json.loads(kept.read_text())
    (rows,) = document["streams"].values()
    assert list(rows) == ["unedited model", "stableedit", "memit"]
    filled = page.read_text()
    assert filled.startswith("before\n") and filled.endswith("after\n") and "old" not in filled
    assert f"★ {rows['stableedit']['scores']['efficacy']['mean']:.3f}" in filled and "| memit |" in filled
    page.write_text(f"{script.MARKS[0]}\n{script.MARKS[1]}\n")
    call(script, monkeypatch, "--kept", kept, "--page", page)
    assert page.read_text().count("|") == filled.count("|")  # figures are kept with five digits
    with pytest.raises(ValueError, match="has no lines"):
        script.fill(kept, "")


def test_charts_of_the_kept_results(scripts, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="charts need the extra 'report'")
    script = scripts("charts")
    call(script, monkeypatch, "--output", tmp_path)
    drawn = {path.stem for path in tmp_path.iterdir()}
    assert drawn == set(script.CHARTS) and "no chart" not in capsys.readouterr().out


def test_a_synthetic_data_set(scripts, tmp_path, monkeypatch):
    with contextlib.suppress(SystemExit):
        call(scripts("ultraeditbench"), monkeypatch, "--records", 10, tmp_path / "data.json")
    assert len(json.loads((tmp_path / "data.json").read_text())) == 10
