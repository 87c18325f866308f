"""``stableedit bench``: the command, its files, a real kill, and what it says about bad input."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path

import pytest

from stableedit_cpp.cli import main
from stableedit_cpp.experiments import EDITORS, StreamRun, read_run
from stableedit_cpp.model.capture import NotFiniteError
from support.commands import started
from support.streams import MODULES, lines, record, write_data
from support.tiny import save_tiny

SMALL = ["--edit-modules", *MODULES, "--turn-size", "10", "--step-size", "1e-2", "--device", "cpu"]
SMALL += ["--warm-up-size", "20", "--checkpoints", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(model: Path, *options: object) -> int:
    """With one pass, unless the options say otherwise."""
    arguments = ["--model", model, "--dataset", "zsre", "--data", "data", "--output", "out", *SMALL, *options]
    if not {"--editor", "--matrix", "ablations"}.intersection(options):
        arguments += ["--editor", "one-pass"]
    return main(["bench", *map(str, arguments)])


def refusal(capsys, model: Path, *options: object) -> str:
    """One sentence on stderr, and nothing written."""
    assert bench(model, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("stableedit: error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert not Path("out").exists()
    return error


def test_ablations(work, model, capsys):
    assert bench(model, "ablations", "--edits", 20, "--geometry", 0) == 0
    table = capsys.readouterr().out
    names = ["one-pass", "no-ln", "no-warm-up", "diagonal", "per-module", "absolute-floor", "frozen-statistics"]
    for name in names:
        assert f"| {name} | zsre | {model} | 0 | 20 |" in table.replace("★ ", "")
        assert read_run(work / "out" / f"{name}-zsre-tiny-seed0")["status"] == "done"
    config = {name: read_run(work / "out" / f"{name}-zsre-tiny-seed0")["settings"]["config"] for name in names}
    assert config["no-ln"]["whitening"] == "none"
    assert config["diagonal"]["whitening"] == config["diagonal"]["warm_up_whitening"] == "diagonal"
    assert config["per-module"]["statistics"] == "per_module"
    assert (config["absolute-floor"]["floor"], config["absolute-floor"]["floor_mode"]) == (1e-6, "absolute")
    assert config["frozen-statistics"]["frozen_statistics"] and not config["one-pass"]["frozen_statistics"]


def test_variants(work, model, capsys):
    options = ["--edits", 20, "--geometry", 0, "--metrics", "accuracy", "--variants", "rephrase"]
    assert bench(model, *options) == 0
    run = read_run(work / "out" / "one-pass-zsre-tiny-seed0")
    assert run["settings"]["data"]["variants"] == ["rephrase"]
    assert run["checkpoints"][-1]["scores"]["variants"]["count"] == 20
    assert run["checkpoints"][-1]["scores"]["generalization"]["count"] == 0
    capsys.readouterr()
    assert bench(model, *options[:-2]) == 2  # another run than the one that is there
    assert "data.variants (" in capsys.readouterr().err


def test_theory(work, model, capsys):
    assert bench(model, "theory", "--edits", 40, "--cumulative", 10) == 0
    theory = json.loads((work / "out" / "theory.json").read_text())["runs"][0]
    assert theory["geometry"]["turns"] == 4
    assert theory["geometry"]["norm"]["mean"] > 0
    assert abs(theory["geometry"]["cosine_last"]["mean"]) <= 1
    assert [point["prior_edits"] for point in theory["cumulative"]["points"]] == [0, 0, 20, 40]
    found = next(iter(theory["convergence"].values()))
    assert found["points"] and found["reference_samples"] > found["points"][-1]["samples"]
    assert "positive" not in capsys.readouterr().err
    assert "rate of convergence" in (work / "out" / "theory.md").read_text()
    assert not (work / "out" / "one-pass-zsre-tiny-seed0" / "covariance").exists()


def test_a_matrix_from_yaml(work, model):
    Path("matrix.yaml").write_text(
        f"""
editors: [ultraedit, {{name: strong, editor: one-pass, step_size: 2e-2}}]
datasets: [{{name: mine, edits: data/zsre/zsre_edit.json, warm_up: data/zsre/zsre_train.json}}]
models: ['{model}']
edits: 20
warm_up_size: 10
editor_options: {{edit_modules: {json.dumps(MODULES)}, turn_size: 10}}
"""
    )
    assert main(["bench", "--matrix", "matrix.yaml", "--output", "out", "--geometry", "0", "--device", "cpu"]) == 0
    strong = read_run("out/strong-mine-tiny-seed0")["settings"]
    assert (strong["config"]["step_size"], strong["geometry"], strong["warm_up"]["size"]) == (0.02, 0, 10)
    assert read_run("out/ultraedit-mine-tiny-seed0")["settings"]["config"]["editor"] == "ultraedit"


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on(work, model):
    command = [sys.executable, "-m", "stableedit_cpp", "bench", "--model", model, "--dataset", "zsre", "--data", "data"]
    command += ["--output", "out", *SMALL, "--snapshot-every", "0", "--editor", "one-pass"]
    run = work / "out" / "one-pass-zsre-tiny-seed0"
    with started(list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 600
        while not (run / "snapshots").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    for path in run.rglob("*.json"):
        if not path.name.startswith("."):
            json.loads(path.read_text())
    assert bench(model) == 0
    document = read_run(run)
    assert document["status"] == "done"
    assert [turn["turn"] for turn in lines(run / "turns.jsonl")] == list(range(1, 9))


def test_ctrl_c_keeps_what_is_done(work, model, capsys, monkeypatch):
    turn = StreamRun._turn

    def pressed(run, kind, requests):
        line, _ = turn(run, kind, requests)
        return line, line["turn"] == 4

    with monkeypatch.context() as patch:
        patch.setattr(StreamRun, "_turn", pressed)
        assert bench(model) == 130
    assert "stopped after 20 of 60 edits; the same command goes on" in capsys.readouterr().err
    assert bench(model) == 0
    document = read_run("out/one-pass-zsre-tiny-seed0")
    assert [stint["from_edits"] for stint in document["provenance"]["stints"]] == [0, 20]


def test_a_model_that_breaks_down_ends_its_stream_only(work, model, monkeypatch, capsys):
    turn = StreamRun._turn

    def broken(run, kind, requests):
        if run.settings.editor.name == "no-ln" and run._cost.edits == 20:
            raise NotFiniteError("request 0: the loss is NaN or infinite; the turn was not applied")
        return turn(run, kind, requests)

    monkeypatch.setattr(StreamRun, "_turn", broken)
    assert bench(model, "--editor", "no-ln", "one-pass") == 0
    document = read_run("out/no-ln-zsre-tiny-seed0")
    assert document["collapsed"]["edits"] == document["checkpoints"][-1]["edits"] == 20
    assert document["status"] == read_run("out/one-pass-zsre-tiny-seed0")["status"] == "done"
    assert f"| no-ln | zsre | {model} | 0 | 20 of 60, broke down |" in capsys.readouterr().out


def test_unknown_names_are_answered_with_the_list_and_the_nearest(work, model, capsys):
    error = refusal(capsys, model, "--editor", "stabledit")
    assert "unknown editor 'stabledit', did you mean 'stableedit'?" in error and all(name in error for name in EDITORS)
    error = refusal(capsys, model, "--dataset", "zsree")
    assert "unknown data set 'zsree', did you mean 'zsre'? known are: zsre, fever, wikibigedit" in error
    error = refusal(capsys, model, "--warm-up", "middel")
    assert "unknown warm-up position 'middel', did you mean 'middle'?" in error
    error = refusal(capsys, model, "--set", "flor=0.3")
    assert "editor one-pass: unknown field of its config 'flor', did you mean 'floor'?" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "missing.json"], "there is no file missing.json"),
        (["--dataset", "fever"], "there is no directory data/fever"),
        (["--warm-up-data", "none.json"], "there is no file none.json"),
        (["--warm-up-size", 50], "holds 40 requests, fewer than the warm-up of 50"),
        (["--step-size", -1], "editor one-pass: step_size must be greater than 0"),
        (["--set", "floor"], "--set has 'floor'; expected FIELD=VALUE"),
        (["--geometry", -1], "geometry must be a whole number, at least 0"),
        (["--cumulative", 60], "too few for a stream of"),
        (
            ["--after", "repair", "mend"],
            "a step after the stream is 'repair', 'repair=BUDGET', 'shrink=SHARE' or 'prune'",
        ),
        (["--seed", "-1"], "seeds must be a whole number"),
        (["--editor", "one-pass", "one-pass"], "two runs would be called one-pass-zsre-tiny-seed0"),
        (["--matrix", "none.yaml"], "none.yaml"),
    ],
)
def test_bad_options(work, model, capsys, options, message):
    assert message in refusal(capsys, model, *options)


def test_bad_yaml(work, model, capsys):
    for content, message in (
        ("editors: [a\nb: ]", "matrix.yaml, line 2"),
        ("- a", "must hold a mapping"),
        ("editor: a", "unknown setting 'editor', did you mean 'editors'?"),
        ("datasets: 3", "datasets must be a list"),
        ("datasets: [zsre]\nedits: many", "edits must be a whole number"),
    ):
        Path("matrix.yaml").write_text(content)
        assert main(["bench", "--matrix", "matrix.yaml", "--model", str(model), "--output", "out"]) == 2
        assert message in capsys.readouterr().err


def test_a_field_missing_in_a_record_is_found_before_the_model_is_loaded(work, capsys):
    records = [record(index) for index in range(30)]
    del records[27]["ans"]
    with gzip.open("data/zsre/zsre_edit.json.gz", "wt") as file:
        json.dump(records, file)
    Path("data/zsre/zsre_edit.json").unlink()
    error = refusal(capsys, Path("no such model"))
    assert "data/zsre/zsre_edit.json.gz, record 27: the record lacks the field 'ans' (target)" in error
    assert "its fields are: src, rephrase, loc, loc_ans, subject" in error


def test_a_directory_with_two_streams_is_refused(work, model, capsys):
    Path("data/zsre/other.json").write_text("[]")
    assert "must hold one file for the stream" in refusal(capsys, model)


def test_help_shows_an_example_and_where_the_editors_are(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert "stableedit bench ablations" in text and "stableedit editors" in text
