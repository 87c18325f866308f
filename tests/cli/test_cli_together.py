"""Commands under torchrun: one speaks and writes, what is written is what one process writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import stableedit_cpp as se
from stableedit_cpp.cli import main
from support.edit_command import REQUESTS, assert_same_weights, weights_of
from support.ranks import commands
from support.streams import MODULES, write_data
from support.tiny import save_tiny

EDIT = ["--preset", "one-pass", "--turn-size", 4, "--step-size", 0.01, "--edit-modules", *MODULES]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", bos=True)


@pytest.fixture
def requests(tmp_path) -> Path:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(REQUESTS), encoding="utf-8")
    return path


@pytest.fixture
def meet(tmp_path) -> Path:
    """Where processes leave what they say."""
    directory = tmp_path / "meet"
    directory.mkdir()
    return directory


def alone(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def side_effects(directory: Path) -> Path:
    """A file that says what of them to measure."""
    pytest.importorskip("sklearn", reason="side effects need the extra 'sideeffects'")
    text, prompts, options = (directory / name for name in ("text.txt", "prompts.txt", "options.json"))
    text.write_text("Some text that a model may read. " * 20)
    prompts.write_text("".join(f"prompt number {index}\n" for index in range(20)))
    asked = {"perplexity": {"text": str(text)}, "prompts": str(prompts), "maps": ["pca"], "permutations": 50}
    options.write_text(json.dumps(asked))
    return options


def timeless(document: object) -> object:
    """Without what is another at every run."""
    if isinstance(document, dict):
        other = ("seconds", "resident_bytes", "extra_bytes", "provenance", "cost", "report", "settings", "environment")
        return {
            name: timeless(value)
            for name, value in document.items()
            if name not in other and not name.endswith(("_seconds", "per_second")) and "time" not in name
        }
    return [timeless(item) for item in document] if isinstance(document, list) else document


def test_edit_writes_what_one_process_writes(model, requests, meet, tmp_path, capsys):
    argv = ["edit", "--model", model, "--requests", requests, *EDIT, "--evaluate", "--json", "--output"]
    alone(*argv, tmp_path / "one")
    expected = json.loads(capsys.readouterr().out)
    first, second = commands([[*argv, tmp_path / "two"]] * 2, meet)
    assert first[0] == second[0] == 0, (first, second)
    assert second[1:] == ("", "")
    found = json.loads(first[1])
    assert found["scores"] == expected["scores"]
    assert timeless(found["edit"]["turns"]) == timeless(expected["edit"]["turns"])
    assert_same_weights(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))


@pytest.mark.slow
def test_a_session_goes_on_with_another_number_of_processes(model, requests, tmp_path):
    for name, counts in (("one", (1, 1)), ("several", (2, 3))):
        session, meets = tmp_path / name, [tmp_path / f"{name}-{step}" for step in ("create", "half", "rest")]
        create = ["session", "create", session, "--model", model, *EDIT]
        edit = ["session", "edit", session, "--requests", requests]
        for argv, count, where in ((create, counts[0], 0), ([*edit, "--limit", 4], counts[0], 1), (edit, counts[1], 2)):
            meets[where].mkdir()
            results = commands([argv] * count, meets[where]) if count > 1 else [alone(*argv)]
            assert count == 1 or all(status == 0 for status, _, _ in results), results
    steps = [
        [record.content["state"] for record in se.lifelong.SessionView(tmp_path / name).journal.records]
        for name in ("one", "several")
    ]
    assert len(steps[0]) == 1 + 4 and steps[0] == steps[1]


@pytest.mark.slow
def test_evaluate_writes_once(model, requests, meet, tmp_path):
    argv = ["evaluate", "--model", model, "--requests", requests, "--output"]
    alone(*argv, tmp_path / "one.json")
    first, second = commands([[*argv, tmp_path / "two.json"], [*argv, tmp_path / "none.json"]], meet)
    assert first[0] == second[0] == 0, (first, second)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert timeless(one) == timeless(two)
    assert not (tmp_path / "none.json").exists()


def test_side_effects_are_written_once(model, meet, tmp_path):
    asked = ["--options", side_effects(tmp_path)]
    argv = ["side-effects", "--model", model, "--reference", model, *asked, "--output"]
    alone(*argv, tmp_path / "one.json")
    first, second = commands([[*argv, tmp_path / "two.json"], [*argv, tmp_path / "none.json"]], meet)
    assert first[0] == second[0] == 0, (first, second)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one["after"]["hidden_states"]["layers"] and timeless(one) == timeless(two)
    assert not (tmp_path / "none.json").exists()


def test_bench_goes_on_and_measures_what_one_process_does(model, meet, tmp_path):
    data = write_data(tmp_path / "data")
    argv = ["bench", "--dataset", "zsre", "--data", data, "--model", model, "--warm-up-size", 10, "--checkpoints", 2]
    argv += ["--edits", 20, "--editor", "one-pass", "--set", "turn_size=10", "step_size=0.01", "--edit-modules"]
    argv += [*MODULES, "--metrics", "accuracy", "locality", "--side-effects", side_effects(tmp_path), "--output"]
    alone(*argv, tmp_path / "one")
    first, second = commands([[*argv, tmp_path / "two"]] * 2, meet)
    assert first[0] == second[0] == 0, (first, second)
    (one,), (two,) = ([*(tmp_path / name).glob("*/run.json")] for name in ("one", "two"))
    measured = [timeless(json.loads(path.read_text())["checkpoints"]) for path in (one, two)]
    assert len(measured[0]) == 3 and measured[0] == measured[1]
    assert all(checkpoint["side_effects"]["perplexity"] for checkpoint in measured[0])
    for result in commands([[*argv, tmp_path / "two"]] * 2, meet):  # it is done
        assert result[0] == 0, result


def test_other_files_are_found_before_the_first_turn(model, requests, meet, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*REQUESTS[:-1], REQUESTS[-1] | {"target": "another"}]), encoding="utf-8")
    argv = ["edit", "--model", model, *EDIT, "--output", tmp_path / "out", "--requests"]
    results = commands([[*argv, requests], [*argv, other]], meet)
    assert [status for status, _, _ in results] == [2, 2]
    assert "the requests of process 1 differ from those of process 0; start all with the same command" in results[0][2]
    assert not (tmp_path / "out").exists()


def test_a_missing_process(model, requests, meet, tmp_path, monkeypatch):
    monkeypatch.setenv("STABLEEDIT_RANK_TIMEOUT", "1")
    argv = ["edit", "--model", model, *EDIT, "--output", tmp_path / "out", "--requests", requests]
    ((status, _, said),) = commands([argv] * 2, meet, started=1)
    assert status == 2
    assert "the 2 processes have not met within 1 seconds (STABLEEDIT_RANK_TIMEOUT): one of them is missing" in said


def test_commands_of_one_process_say_so(meet):
    for status, _, said in commands([["env"]] * 2, meet):
        assert status == 2
        assert (
            "stableedit env runs in one process; torchrun is for edit, evaluate, session, bench and side-effects"
            in said
        )


@pytest.mark.slow
def test_torchrun_itself(model, requests, tmp_path):
    argv = ["edit", "--model", model, "--requests", requests, *EDIT, "--output"]
    alone(*argv, tmp_path / "one")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "stableedit_cpp"]
    done = subprocess.run([*run, *map(str, argv), tmp_path / "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights_of(tmp_path / "one"), weights_of(tmp_path / "two"))
