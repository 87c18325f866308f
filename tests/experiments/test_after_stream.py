"""Repairs and shrinking after a stream: the same as by hand, scored after each, and resumed in between."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.experiments import Step, find_source, read_run, run_matrix
from stableedit_cpp.experiments.checkpoints import Checkpoints
from stableedit_cpp.lifelong.repair import repair
from support.streams import OPTIONS, bench, lines, load, matrix, write_data

EDITOR = {"name": "loop", "editor": "closed-loop", "take_probability": 0.2}
AFTER = ["repair", {"repair": 7, "step_size": 5e-3}, "shrink=0.9", "shrink=0.8"]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def by_hand(data) -> list[dict[str, float]]:
    """The means after the stream and after each step of ``AFTER``."""
    (model, tokenizer), source = load("tiny"), find_source("zsre", data=data)
    config = dataclasses.replace(se.StableEditConfig.closed_loop(), **OPTIONS, take_probability=0.2)
    editor = se.StableEdit(model, tokenizer, config)
    editor.warm_up(source.warm_up_requests(0, 20), progress=False)
    requests = list(source.requests(0, 40))
    editor.edit(requests, progress=False)
    found = []

    def score() -> None:
        how = {"metrics": ["accuracy"], "reference": editor.unedited, "progress": False}
        scores = se.evaluate(model, tokenizer, requests, **how)
        found.append(scores.means())

    score()
    repair(editor, requests, progress=False)
    score()
    second = se.StableEdit(model, tokenizer, dataclasses.replace(config, step_size=5e-3))
    second.keep_original_weights(editor.original_weights())
    second.load_state_dict(editor.state_dict())
    repair(second, requests, budget=7, progress=False)
    editor = second
    score()
    originals = {name: weight.double() for name, weight in editor.original_weights().items()}
    repaired = {name: weight.double() for name, weight in editor.state_dict()["weights"].items()}
    for share in (0.9, 0.8):
        with torch.no_grad():
            for name, weight in repaired.items():
                shrunk = originals[name] + share * (weight - originals[name])
                model.get_submodule(name).weight.copy_(shrunk)
        score()
    return found


def test_each_step_is_scored_and_is_what_it_is_by_hand(data, tmp_path):
    document = bench(data, tmp_path / "out", editors=[{**EDITOR, "after": AFTER}])[0]
    end, *steps = document["checkpoints"][2:]
    assert [(entry["edits"], entry["turn"], entry["after"], entry["step"]) for entry in steps] == [
        *((40, 7, "repair", 1), (40, 8, "repair=7", 2), (40, 9, "shrink=0.9", 3), (40, 10, "shrink=0.8", 4))
    ]
    for entry, means in zip([end, *steps], by_hand(data), strict=True):
        for name, mean in means.items():
            assert entry["scores"][name]["mean"] == pytest.approx(mean, abs=1e-6), (entry.get("after"), name)
    drifts = [entry["scores"]["locality_kl"]["mean"] for entry in [end, *steps]]
    assert len(set(drifts)) == 5 and drifts[-1] < drifts[-2] < drifts[-3]  # every step did something
    turns = lines(tmp_path / "out" / document["name"] / "turns.jsonl")
    assert [turn["kind"] for turn in turns[-5:]] == ["edit", "repair", "repair", "shrink", "shrink"]
    assert turns[-4]["requests"] > turns[-3]["requests"] == 7
    assert document["cost"]["after_seconds"] == pytest.approx(sum(sum(t["seconds"].values()) for t in turns[-4:]))
    assert document["cost"]["edits"] == 40
    run = tmp_path / "out" / document["name"]
    names = [path.name for path in sorted((run / "requests").iterdir())][2:]
    assert names == ["00000040-1.jsonl", "00000040-2.jsonl", "00000040-3.jsonl", "00000040-4.jsonl", "00000040.jsonl"]
    assert "| 40, repair=7 |" in (run / "table.md").read_text()
    assert "| 40, shrink=0.8 |" in (tmp_path / "out" / "table.md").read_text()
    model, tokenizer = load("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = matrix(data, edits=10, after=AFTER[1:3]).runs(progress=False)
    run_matrix(runs, tmp_path / "again", lambda _: (model, tokenizer), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def assert_close(there, here) -> None:
    """Equal but for the last digits of a divergence: where less is kept, prompts share their batch with others."""
    if isinstance(there, dict):
        assert there.keys() == here.keys()
        for key, value in there.items():
            assert_close(value, here[key])
    elif isinstance(there, list):
        assert len(there) == len(here)
        for one, other in zip(there, here, strict=True):
            assert_close(one, other)
    else:
        assert here == (pytest.approx(there, rel=1e-4, abs=1e-6) if isinstance(there, float) else there)


@pytest.mark.parametrize("at", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_kill_in_a_step_costs_that_step(data, tmp_path, monkeypatch, at):
    settings = {"editors": [{**EDITOR, "after": AFTER}], "sample": 15}
    whole = bench(data, tmp_path / "whole", **settings)[0]

    class Killed(BaseException):
        pass

    run, take = Step.run, Checkpoints.take

    def killed_before(step, *arguments, **how):
        if step == Step.parse(AFTER[at]):
            raise Killed
        return run(step, *arguments, **how)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Step, "run", killed_before)
        bench(data, tmp_path / "out", **settings)

    def killed_scoring(checkpoints):
        if checkpoints._cost.steps == at + 1:
            raise Killed
        take(checkpoints)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "take", killed_scoring)
        bench(data, tmp_path / "out", **settings)
    resumed = bench(data, tmp_path / "out", **settings)[0]
    parts = ("turn", "scores", "ages")
    for there, here in zip(whole["checkpoints"], resumed["checkpoints"], strict=True):
        assert_close({part: there[part] for part in parts}, {part: here[part] for part in parts})
    kinds = [[turn["kind"] for turn in lines(tmp_path / o / whole["name"] / "turns.jsonl")] for o in ("out", "whole")]
    assert kinds[0] == kinds[1]
    assert read_run(tmp_path / "out" / whole["name"])["status"] == "done"


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("mend", "a step after the stream is 'repair', 'repair=BUDGET', 'shrink=SHARE' or 'prune', not"),
        ("prune=3", "prune takes no amount and no fields of a config"),
        ("repair=many", "repair must be a whole number, at least 1, or None, not 'many'"),
        ("repair=0", "repair must be a whole number"),
        ("shrink", "shrink must be"),
        ("shrink=1.5", "shrink must be greater than 0 and at most 1, not 1.5"),
        ({"shrink": 0.9, "ridge": 1.0}, "shrink takes no fields of a config, not ridge"),
        ({"repair": None, "rige": 1.0}, "unknown field of the config 'rige', did you mean 'ridge'"),
        ({"repair": None, "ridge": -1.0}, "ridge must be greater than 0"),
        (3, "a step after the stream is"),
    ],
)
def test_a_bad_step_gets_a_sentence_before_anything_is_run(data, item, sentence):
    with pytest.raises(ValueError, match=sentence):
        matrix(data, after=[item]).runs(progress=False)


def test_steps_survive_json():
    for item in AFTER:
        step = Step.parse(item)
        assert Step.parse(step.to_dict()) == step
    assert [str(Step.parse(item)) for item in AFTER] == ["repair", "repair=7", "shrink=0.9", "shrink=0.8"]
    assert Step.parse("shrink=1").amount == 1


def test_another_step_is_another_configuration(data, tmp_path):
    bench(data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"another configuration: after \(null there"):
        bench(data, tmp_path / "out", after=["repair"])
