"""Results as they are written are what is read: run directories, theory, the report, and those of earlier versions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from stableedit_cpp.cli import main
from stableedit_cpp.core import load_safetensors, save_safetensors, save_state
from stableedit_cpp.errors import DamagedSnapshot
from stableedit_cpp.experiments import read_results, read_run
from stableedit_cpp.experiments.run_directory import RunDirectory
from support.results import write_run, write_theory
from support.streams import Killed, bench, killed_after, lines, load, matrix, write_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def everything(data: Path) -> dict[str, object]:
    """Settings under which all that a run can measure is measured."""
    prompts = data / "prompts.txt"
    prompts.write_text("ab\nba\ncd\ndc\n")
    effects = {"perplexity": {"own": str(prompts)}, "prompts": str(prompts), "maps": ["pca"]}
    return {"editors": ["one-pass", "no-ln"], "cumulative": 10, "convergence": True, "side_effects": effects}


def stopped_after(turns: int, data: Path, output: Path, monkeypatch, **changes) -> Path:
    """A run that was killed after so many turns, with a snapshot after the one before."""
    with killed_after(turns, monkeypatch):
        bench(data, output, how={"snapshot_seconds": 0.0}, **changes)
    return output / "one-pass-zsre-tiny-seed0"


# --- what is written is what is read ---


def test_what_a_bench_has_written_becomes_a_report(data, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="a report needs the extra 'report'")
    documents = bench(data, tmp_path / "out", **everything(data), metrics=["accuracy"])
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "page"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["page"] == str(tmp_path / "page" / "index.html") and said["results"] == [str(tmp_path / "out")]
    assert said["charts"] == sorted(map(str, (tmp_path / "page" / "charts").iterdir()))
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    for title in ("Along the stream", "Retention by age", "Geometry", "Hidden states", "Downstream tasks", "Cost"):
        assert title in text
    for table in ("comparison", "theory", "hidden-states", "cost", "provenance"):
        assert f'<table data-name="{table}">' in text, table
    kinds = {re.split(r"[-.]", path.name)[0] for path in (tmp_path / "page" / "charts").iterdir()}
    assert kinds >= {"curve", "retention", "final", "geometry", "map", "perplexity", "memory", "time", "convergence"}
    score = documents[0]["checkpoints"][-1]["scores"]["efficacy"]
    assert f"{score['mean']:.3f} ± {score['standard_error']:.3f}" in text


def test_results_are_read_back_as_they_were_written(data, tmp_path):
    documents = bench(data, tmp_path / "out", **everything(data))
    found = read_results([tmp_path / "out"])
    assert {run.document["name"]: run.document for run in found.runs} == {d["name"]: d for d in documents}
    for run in found.runs:
        assert run.turns == lines(run.path / "turns.jsonl")
        assert len(run.geometry) == len(run.turns) == 6
        assert run.unedited["turn"] == 0 and run.finished
        assert "geometry" not in run.editing_seconds and "probe" not in run.editing_seconds
        assert sum(run.editing_seconds.values()) == pytest.approx(run.document["cost"]["seconds"])
    ((_, theory),) = found.theories
    assert [run["run"] for run in theory["runs"]] == [document["name"] for document in documents]
    text = (tmp_path / "out" / "theory.md").read_text()
    assert "rate of convergence" in text and "the same 10 edits after others" in text


def test_the_made_up_results_of_other_tests_are_like_real_ones(data, tmp_path):
    """Whatever they contain is there in real results as well, so a test with them says something about those."""
    real = Path(tmp_path / "real" / bench(data, tmp_path / "real", **everything(data))[0]["name"])
    made_up = write_run(tmp_path / "made-up")
    theories = [json.loads(path.read_text()) for path in (real.parent / "theory.json", write_theory(made_up, "a run"))]
    turns = [lines(path / "turns.jsonl")[-1] for path in (real, made_up)]
    for there, here in ([read_run(real), read_run(made_up)], theories, turns):
        assert places(here) - places(there) <= {"checkpoints.side_effects.downstream"}


def places(value: object, place: str = "") -> set[str]:
    """Dotted keys, but not those that are names of data, scores or modules."""
    if isinstance(value, list):
        return {found for item in value for found in places(item, place)}
    if not isinstance(value, dict) or place.endswith(("scores", "perplexity", "layers", "before", "after", "drift")):
        return set()
    if place.endswith(("downstream", "convergence", "statistics", "environment", "config", "seconds_by_part")):
        return set()
    names = {name: f"{place}.{name}".removeprefix(".") for name in value}
    return set(names.values()).union(*(places(value[name], inner) for name, inner in names.items()))


def test_results_of_earlier_versions_stay_readable():
    found = read_results([ROOT / "bench" / "results" / "runs", ROOT / "bench" / "results" / "theory"])
    assert len(found.runs) > 10 and len(found.theories) == 1
    assert all(run.finished and run.turns and run.editing_seconds for run in found.runs)


def test_locality_along_the_answer_of_the_data_set_keeps_its_meaning(tmp_path):
    """In earlier versions ``locality_agreement`` followed the data set's answer: it must not pass for today's."""
    run = write_run(tmp_path / "runs")
    document = json.loads((run / "run.json").read_text())
    earlier = {"efficacy": "efficacy", "portability": "multi_hop", "locality_agreement": "locality_agreement"}
    earlier |= {"efficacy_contains": "multi_hop_contains", "locality_kl": "locality_kl"}

    def as_written_then(scores: dict) -> dict:
        return {then: scores[now] for now, then in earlier.items()}

    for checkpoint in document["checkpoints"]:
        for part in (checkpoint, *checkpoint["ages"]):
            part["scores"] = as_written_then(part["scores"])
        checkpoint["cumulative"] = {"before": dict(checkpoint["scores"]), "after": None}
    (run / "run.json").write_text(json.dumps(document))
    (run / "requests").mkdir()
    (run / "requests" / "00001000.jsonl").write_text('{"index": 0, "multi_hop": 0.5, "locality_kl": 0.1}\n')
    (found,) = read_results([tmp_path / "runs"]).runs
    now = {"efficacy", "portability", "portability_contains", "locality_target_agreement", "locality_target_kl"}
    for part in (found.last, found.last["ages"][0]):
        assert set(part["scores"]) == now
    assert set(found.last["cumulative"]["before"]) == now
    then = document["checkpoints"][-1]["scores"]
    assert found.last["scores"]["locality_target_agreement"] == then["locality_agreement"]
    assert found.records(found.last) == [{"index": 0, "portability": 0.5, "locality_target_kl": 0.1}]
    pytest.importorskip("matplotlib", reason="a report needs the extra 'report'")
    assert main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "top-1 agreement along the data set&#39;s unrelated answer" in text
    assert "locality: top-1 agreement" not in text


# --- where an interrupted run goes on ---


def test_an_unfinished_run_of_an_earlier_version_is_refused(data, tmp_path, monkeypatch):
    run = stopped_after(4, data, tmp_path / "out", monkeypatch)
    document = read_run(run)
    del document["snapshot"]
    (run / "run.json").write_text(json.dumps(document))
    shutil.rmtree(run / "snapshots")
    save_state(run / "state.safetensors", {}, config='{"turn": 3, "edits": 10, "warm_up": 20}')  # as 0.1.0 left it
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="an unfinished run of an earlier version"):
        bench(data, tmp_path / "out")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_finished_run_of_an_earlier_version_is_left_alone(data, tmp_path):
    document = bench(data, tmp_path / "out")[0]
    run = tmp_path / "out" / document["name"]
    save_state(run / "state.safetensors", {}, config="{}")  # kept there by --keep-state
    del document["settings"]["after"]  # which 0.1.0 did not have
    (run / "run.json").write_text(json.dumps(document))
    assert bench(data, tmp_path / "out")[0] == document


def test_the_state_is_the_one_that_was_saved_or_none(data, tmp_path, monkeypatch):
    run = stopped_after(4, data, tmp_path / "out", monkeypatch)
    (snapshot,) = (run / "snapshots").iterdir()
    assert read_run(run)["snapshot"]["turn"] == int(snapshot.stem.removeprefix("record-")) == 3
    tensors, metadata = load_safetensors(snapshot)
    name = next(name for name in tensors if name.startswith("weights/"))
    changed = {**tensors, name: tensors[name] + 1e-3}
    save_safetensors(snapshot, changed, {k: v for k, v in metadata.items() if not k.startswith("stableedit.")})
    with pytest.raises(DamagedSnapshot):  # a valid file, but of another state
        bench(data, tmp_path / "out")
    assert read_run(run)["status"] == "running"


def test_a_kill_between_snapshot_and_document_goes_on_from_the_snapshot_before(data, tmp_path, monkeypatch):
    whole = bench(data, tmp_path / "whole")[0]
    saved = RunDirectory._save

    def killed(directory):
        if directory.document.get("snapshot", {}).get("turn") == 3:
            raise Killed
        saved(directory)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDirectory, "_save", killed)
        bench(data, tmp_path / "out", how={"snapshot_seconds": 0.0})
    run = tmp_path / "out" / whole["name"]
    assert read_run(run)["snapshot"]["turn"] == 2
    assert len(list((run / "snapshots").iterdir())) == 2
    resumed = bench(data, tmp_path / "out")[0]
    assert [entry["scores"] for entry in resumed["checkpoints"]] == [entry["scores"] for entry in whole["checkpoints"]]
    assert [turn["turn"] for turn in lines(run / "turns.jsonl")] == list(range(1, 7))
    assert not (run / "snapshots").exists() and "snapshot" not in resumed


def test_the_state_of_a_finished_run_is_kept_where_asked(data, tmp_path):
    document = bench(data, tmp_path / "out", how={"keep_state": True})[0]
    directory = RunDirectory(tmp_path / "out" / document["name"], document["name"], document["settings"])
    state = directory.load_state()
    model, _ = load("tiny")
    for name, weight in state["weights"].items():
        assert weight.shape == model.get_submodule(name).weight.shape
    assert document["snapshot"]["turn"] == 6
    assert matrix(data).runs(progress=False)[0].name == document["name"]
