"""The search before a run: what it tries, on which edits, what it finds, and that it goes on where it was stopped."""

from __future__ import annotations

import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.experiments import find_source, run_matrix
from stableedit_cpp.experiments import search as searching
from support.streams import MODULES, OPTIONS, bench, load, matrix, write_data
from support.tiny import tiny_model

STEPS = [1e-3, 1e-2]
EDITOR = {"name": "mine", "editor": "one-pass", "search": {"step_size": STEPS}}
SCORE = {"efficacy": 1.0, "locality_agreement": 1.0}
SEARCH = {"edits": 12, "score": SCORE}


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def found_in(output) -> dict:
    return json.loads((output / "search" / "mine-zsre-tiny-seed0.json").read_text())


def test_the_best_value_on_held_out_edits_is_run(data, tmp_path):
    model, tokenizer = load("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = matrix(data, editors=[EDITOR], search=SEARCH).runs()
    document = run_matrix(runs, tmp_path / "out", lambda _: (model, tokenizer), progress=False)[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    search = found_in(tmp_path / "out")
    assert [trial["values"] for trial in search["trials"]] == [{"step_size": step} for step in STEPS]

    # By hand: after the warm-up, the twelve that follow the stream of forty, into the unedited model.
    source = find_source("zsre", data=data)
    held_out = list(source.requests(40, 52))
    scores = []
    for step in STEPS:
        editor = se.StableEdit(
            tiny_model("llama"), tokenizer, se.StableEditConfig.one_pass(**(OPTIONS | {"step_size": step})), guard=None
        )
        editor.warm_up(source.warm_up_requests(0, 20), progress=False)
        editor.edit(held_out, progress=False)
        how = {"metrics": ["accuracy", "locality"], "reference": editor.unedited, "progress": False}
        means = se.evaluate(editor.model, tokenizer, held_out, **how).means()
        scores.append((means["efficacy"] + means["locality_agreement"]) / 2)
    assert [trial["score"] for trial in search["trials"]] == pytest.approx(scores)
    best = STEPS[max(range(2), key=lambda index: scores[index])]
    assert search["found"] == {"step_size": best}
    settings = document["settings"]
    assert settings["config"]["step_size"] == best
    assert settings["search"] == {
        "values": {"step_size": STEPS},
        "edits": 12,
        "score": SCORE,
        "found": {"step_size": best},
    }

    alone = {"name": "mine", "editor": "one-pass", "step_size": best}
    expected = bench(data, tmp_path / "alone", editors=[alone])[0]
    assert document["checkpoints"][-1]["scores"] == expected["checkpoints"][-1]["scores"]


def test_trials_that_are_done_are_not_done_again(data, tmp_path, monkeypatch):
    real, calls = searching._trial, []

    def counted(run, config, *args, **kwargs):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(config.step_size)
        return real(run, config, *args, **kwargs)

    monkeypatch.setattr(searching, "_trial", counted)
    how = {"editors": [EDITOR], "search": SEARCH}
    with pytest.raises(KeyboardInterrupt):
        bench(data, tmp_path / "out", **how)
    assert [trial["values"]["step_size"] for trial in found_in(tmp_path / "out")["trials"]] == STEPS[:1]
    monkeypatch.setattr(searching, "_trial", lambda run, config, *args, **kwargs: real(run, config, *args, **kwargs))
    first = bench(data, tmp_path / "out", **how)

    def not_again(_name):
        raise AssertionError("nothing is left to do")

    assert run_matrix(matrix(data, **how).runs(), tmp_path / "out", not_again) == first


def test_another_search_is_refused(data, tmp_path):
    bench(data, tmp_path / "out", editors=[EDITOR], search=SEARCH)
    with pytest.raises(ValueError, match=r"search of another configuration: search.edits \(12 there, 10 here\)"):
        bench(data, tmp_path / "out", editors=[EDITOR], search=SEARCH | {"edits": 10})


def test_a_value_that_breaks_the_model_is_not_found(data, tmp_path):
    editor = EDITOR | {"search": {"step_size": [1e30, 1e-2]}}
    document = bench(data, tmp_path / "out", editors=[editor], search=SEARCH)[0]
    assert document["settings"]["config"]["step_size"] == 1e-2
    assert not found_in(tmp_path / "out")["trials"][0]["score"]


@pytest.mark.parametrize(
    ("editor", "search", "words"),
    [
        ({"search": {"steps": [1.0]}}, {}, "unknown field of its config 'steps'"),
        ({"search": {"step_size": 1.0}}, {}, "search of step_size must be a list of values"),
        ({"search": {"step_size": [1e-3, -1.0]}}, {}, "step_size must be greater than 0"),
        ({"search": {"edit_modules": [MODULES]}}, {}, "a search cannot try edit_modules"),
        ({}, {"edit": 5}, "unknown setting of an entry of search 'edit'"),
        ({}, {"edits": 0}, "edits of the search"),
        ({}, {"score": {"locality_kl": 1.0}}, "more locality_kl is worse"),
        ({}, {"edits": 50}, "too few for a stream of 40 and 50 more for the search"),
    ],
)
def test_bad_searches_are_refused(editor, search, words, data):
    with pytest.raises(ValueError, match=words):
        matrix(data, editors=[EDITOR | editor], search=search).runs()
