"""The stream runner: what it measures, that nothing of the model is left changed, and how it goes on."""

from __future__ import annotations

import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.experiments import Matrix, find_source, read_run, run_matrix
from stableedit_cpp.experiments.scorer import Scorer, age_bins, sample_positions
from support.streams import MODULES, OPTIONS, Killed, bench, killed_after, lines, load, matrix, write_data
from support.tiny import tiny_model, tiny_tokenizer

TIMES = ("from_run", "seconds", "resident_bytes", "extra_bytes")


def figures(document: dict) -> list[dict]:
    """Checkpoints without what depends on the machine."""
    return [{name: value for name, value in entry.items() if name not in TIMES} for entry in document["checkpoints"]]


def turns_of(path) -> list[dict]:
    return [{name: value for name, value in turn.items() if name not in TIMES} for turn in lines(path / "turns.jsonl")]


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def test_a_run_scores_what_the_editor_alone_gives(data, tmp_path):
    document = bench(data, tmp_path / "out", metrics=["accuracy", "exact_match", "locality"])[0]
    run = tmp_path / "out" / "one-pass-zsre-tiny-seed0"
    assert read_run(run) == document
    assert document["status"] == "done"
    assert [(entry["edits"], entry["warm_up"]) for entry in document["checkpoints"]] == [(0, 0), (20, 20), (40, 20)]

    model, tokenizer = load("tiny")
    source = find_source("zsre", data=data)
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(**OPTIONS))
    editor.warm_up(source.warm_up_requests(0, 20), progress=False)
    requests = list(source.requests(0, 40))
    metrics = ["accuracy", "exact_match", "locality"]
    before = se.evaluate(tiny_model("llama"), tokenizer, requests, progress=False)
    editor.edit(requests, progress=False)
    after = se.evaluate(model, tokenizer, requests, metrics=metrics, reference=editor.unedited, progress=False)
    unedited, last = document["checkpoints"][0]["scores"], document["checkpoints"][-1]["scores"]
    for name in ("efficacy", "generalization", "specificity"):
        assert unedited[name]["mean"] == before.means()[name]
    assert set(last) == set(after.means())
    for name, mean in after.means().items():
        score = last[name]
        assert (score["mean"], score["standard_error"], score["count"]) == (mean, after.standard_errors[name], 40)
    assert last["locality_kl"]["mean"] > 0.001 and unedited["locality_kl"]["mean"] < 1e-6  # and it did edit
    records = lines(run / "requests" / "00000040.jsonl")
    assert [record["efficacy"] for record in records] == [record["efficacy"] for record in after.per_request]
    assert [record["age"] for record in records] == list(range(39, -1, -1))


def test_turns_cost_and_table(data, tmp_path):
    document = bench(data, tmp_path / "out")[0]
    run = tmp_path / "out" / document["name"]
    turns = lines(run / "turns.jsonl")
    assert [turn["kind"] for turn in turns] == ["warm_up"] * 2 + ["edit"] * 4
    assert [(turn["edits"], turn["warm_up"]) for turn in turns[1:4]] == [(0, 20), (10, 20), (20, 20)]
    cost = document["cost"]
    editing = sum(sum(s for part, s in t["seconds"].items() if part not in ("geometry", "probe")) for t in turns)
    assert cost["seconds"] == pytest.approx(editing)
    assert cost["edits_per_second"] == pytest.approx(60 / editing)
    assert (cost["edits"], cost["warm_up_edits"]) == (40, 20)
    assert cost["peak_resident_bytes"] >= max(turn["resident_bytes"] for turn in turns)
    table = (run / "table.md").read_text()
    last = document["checkpoints"][-1]["scores"]["efficacy"]
    assert f"{last['mean']:.3f} ± {last['standard_error']:.3f}" in table
    assert "| one-pass | zsre | tiny | 0 | 40 |" in (tmp_path / "out" / "table.md").read_text()
    assert not (run / "snapshots").exists() and "snapshot" not in document
    provenance = document["provenance"]
    assert provenance["environment"]["torch"] == torch.__version__
    assert provenance["finished"] >= provenance["started"]
    assert len(document["settings"]["data"]["digest"]) == 64
    assert document["settings"]["config"]["edit_modules"] == MODULES


def test_a_prompt_that_comes_twice_in_a_turn(data, tmp_path):
    """The turn is written down in two parts, and checkpoints stay where they are."""
    path = data / "zsre" / "zsre_edit.json"
    records = json.loads(path.read_text())
    records[13] = {**records[13], "src": records[11]["src"]}
    path.write_text(json.dumps(records))
    document = bench(data, tmp_path / "out", editors=["ultraedit"])[0]
    turns = lines(tmp_path / "out" / document["name"] / "turns.jsonl")
    assert [turn["edits"] for turn in turns] == [10, 13, 20, 30, 40]
    assert [turn["turn"] for turn in turns] == [1, 2, 3, 4, 5]
    assert [turn["requests"] for turn in turns] == [10, 3, 7, 10, 10]
    assert [bool(turn["geometry"]) for turn in turns] == [True, False, True, True, True]
    assert [entry["edits"] for entry in document["checkpoints"]] == [0, 20, 40]

    model, tokenizer = load("tiny")
    editor = se.UltraEdit(model, tokenizer, se.UltraEditConfig(**OPTIONS))
    requests = list(find_source("zsre", data=data).requests(0, 40))
    for begin in range(0, 40, 10):
        editor.edit(requests[begin : begin + 10], progress=False)
    after = se.evaluate(model, tokenizer, requests, metrics=["locality"], reference=editor.unedited, progress=False)
    assert document["checkpoints"][-1]["scores"]["locality_kl"]["mean"] == after.means()["locality_kl"]


@pytest.mark.parametrize(
    ("position", "order"),
    [
        ("start", "wweeee"),
        ("q1", "ewweee"),
        ("middle", "eewwee"),
        ("q3", "eeewwe"),
        ("end", "eeeeww"),
        ("none", "eeee"),
    ],
)
def test_position_of_the_warm_up(data, tmp_path, position, order):
    document = bench(data, tmp_path / "out", warm_up=position, geometry=0)[0]
    turns = lines(tmp_path / "out" / document["name"] / "turns.jsonl")
    assert "".join(turn["kind"][0] for turn in turns) == order
    assert [entry["edits"] for entry in document["checkpoints"]] == [0, 20, 40]
    assert document["checkpoints"][-1]["warm_up"] == (0 if position == "none" else 20)
    assert all(turn["geometry"] is None for turn in turns)


def test_several_runs_share_a_model_and_leave_it_as_it_was(data, tmp_path):
    model, tokenizer = load("tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    runs = matrix(data, editors=["one-pass", "diagonal", "no-warm-up"]).runs()
    together = run_matrix(runs, tmp_path / "together", lambda _: (model, tokenizer), progress=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    alone = bench(data, tmp_path / "alone", editors=["diagonal"], how={"trunk_bytes": 0})[0]
    assert figures(alone) == figures(together[1])
    assert figures(together[0]) != figures(together[1])
    assert [document["settings"]["warm_up"]["size"] for document in together] == [20, 20, 0]


def test_the_unedited_model_is_measured_once_for_all_editors_of_a_stream(data, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\nba\ncd\ndc\n")
    texts = {"side_effects": {"perplexity": {"own": str(prompts)}, "prompts": str(prompts), "maps": ["pca"]}}
    editors = ["one-pass", "diagonal", "no-ln"]
    together = bench(data, tmp_path / "together", editors=editors, **texts)
    assert [document["checkpoints"][0].get("from_run") for document in together] == [None, *[together[0]["name"]] * 2]
    for document in together[1:]:
        assert document["checkpoints"][-1]["side_effects"]["hidden_states"]["layers"]
        records = [
            lines(tmp_path / "together" / d["name"] / "requests" / "00000000.jsonl") for d in (document, together[0])
        ]
        assert records[0] == records[1]
    alone = bench(data, tmp_path / "alone", editors=["no-ln"], how={"trunk_bytes": 0}, **texts)[0]
    for document in (alone, together[2]):
        for entry in document["checkpoints"]:
            del entry["side_effects"]["seconds"]
    assert figures(alone) == figures(together[2])
    other = bench(data, tmp_path / "together", editors=["per-module"], sample=7, **texts)[0]
    assert "from_run" not in other["checkpoints"][0]


KILLS = [("one-pass", 1), ("closed-loop", 2), ("ultraedit", 4), ("one-pass", 6)]
MORE_KILLS = [(editor, at) for editor in ("one-pass", "ultraedit", "closed-loop") for at in (1, 2, 4, 6)]
MORE_KILLS = [kill for kill in MORE_KILLS if kill not in [*KILLS, ("ultraedit", 6)]]  # which ends after turn 4


@pytest.mark.parametrize(
    ("editor", "at"), [*KILLS, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in MORE_KILLS)]
)
def test_a_run_goes_on_as_if_it_had_not_been_killed(data, tmp_path, monkeypatch, editor, at):
    options = {"editors": [editor], "cumulative": 10, "convergence": True, "geometry": 2, "sample": 15}
    warm_up_turns = 0 if editor == "ultraedit" else 2
    whole = bench(data, tmp_path / "whole", **options)[0]
    with killed_after(at, monkeypatch):
        bench(data, tmp_path / "out", how={"snapshot_seconds": 0.0}, **options)
    directory = tmp_path / "out" / whole["name"]
    with (directory / "turns.jsonl").open("a") as file:
        file.write('{"turn": 99, "ki')  # cut off in the middle of a line
    assert read_run(directory)["status"] == "running"
    resumed = bench(data, tmp_path / "out", **options)[0]
    assert figures(resumed) == figures(whole)
    assert resumed["convergence"] == whole["convergence"]
    assert turns_of(directory) == turns_of(tmp_path / "whole" / whole["name"])
    for path in (tmp_path / "whole" / whole["name"] / "requests").iterdir():
        assert path.read_bytes() == (directory / "requests" / path.name).read_bytes()
    starts = [stint["from_edits"] for stint in resumed["provenance"]["stints"]]
    assert starts == [0, 10 * max(0, at - 1 - warm_up_turns)]


@pytest.mark.parametrize("at", [20, 40])
def test_a_checkpoint_that_was_cut_off_is_taken_by_the_next_process(data, tmp_path, monkeypatch, at):
    whole = bench(data, tmp_path / "whole")[0]
    score = Scorer.edited

    def killed(scorer, edits):
        if edits == at:
            raise Killed
        return score(scorer, edits)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Scorer, "edited", killed)
        bench(data, tmp_path / "out")
    resumed = bench(data, tmp_path / "out")[0]
    assert [entry["edits"] for entry in resumed["checkpoints"]] == [0, 20, 40]
    assert figures(resumed) == figures(whole)


def test_a_run_that_is_done_is_left_alone(data, tmp_path):
    first = bench(data, tmp_path / "out")[0]

    def not_again(_name):
        raise AssertionError("nothing is left to do")

    assert run_matrix(matrix(data).runs(), tmp_path / "out", not_again)[0] == first


def test_another_configuration_is_refused_before_anything_is_run(data, tmp_path):
    bench(data, tmp_path / "out")
    before = (tmp_path / "out" / "one-pass-zsre-tiny-seed0" / "run.json").read_bytes()
    changed = {"editor_options": OPTIONS | {"step_size": 5e-3}, "warm_up_size": 10, "sample": 7}
    with pytest.raises(ValueError, match="another configuration") as error:
        bench(data, tmp_path / "out", **changed)
    for part in ("config.step_size (0.01 there, 0.005 here)", "warm_up.size (20 there, 10 here)", "sample (null"):
        assert part in str(error.value)
    assert "turn_size" not in str(error.value)
    write_data(data, edits=50)  # other data of the same name
    with pytest.raises(ValueError, match=r"another configuration: data.digest"):
        bench(data, tmp_path / "out")
    assert (tmp_path / "out" / "one-pass-zsre-tiny-seed0" / "run.json").read_bytes() == before


def test_data_that_has_moved_are_the_same_data(data, tmp_path):
    first = bench(data, tmp_path / "out")[0]
    data.rename(tmp_path / "elsewhere")
    assert bench(tmp_path / "elsewhere", tmp_path / "out")[0] == first


def test_another_model_is_refused(data, tmp_path):
    bench(data, tmp_path / "out", how={"snapshot_seconds": 0.0})
    path = tmp_path / "out" / "one-pass-zsre-tiny-seed0" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    with pytest.raises(ValueError, match="model_digest"):
        run_matrix(matrix(data).runs(), tmp_path / "out", lambda _: (tiny_model("llama", seed=1), tiny_tokenizer()))


def test_something_else_in_the_way(data, tmp_path):
    place = tmp_path / "out" / "one-pass-zsre-tiny-seed0"
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="no run of `stableedit bench`"):
        bench(data, tmp_path / "out")
    (place / "mine.txt").unlink()
    (place / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        bench(data, tmp_path / "out")


def test_the_same_edits_after_others(data, tmp_path):
    """Fresh model, warm-up alone, and after each part of the stream; the stream itself does not notice."""
    plain = bench(data, tmp_path / "plain")[0]
    document = bench(data, tmp_path / "out", cumulative=10)[0]
    for with_, without in zip(figures(document), figures(plain), strict=True):
        assert {**with_, "cumulative": None} == without
    source, (model, tokenizer) = find_source("zsre", data=data), load("tiny")
    others, same = list(source.requests(0, 20)), list(source.requests(40, 50))
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(**OPTIONS))
    editor.warm_up(source.warm_up_requests(0, 20), progress=False)
    editor.edit(others, progress=False)
    before = se.evaluate(model, tokenizer, same, progress=False).efficacy
    editor.edit(same, progress=False)
    after = se.evaluate(model, tokenizer, same, progress=False).efficacy
    entry = document["checkpoints"][1]["cumulative"]
    assert (entry["before"]["efficacy"]["mean"], entry["after"]["efficacy"]["mean"]) == (before, after)
    assert set(document["checkpoints"][0]["cumulative"]) == {"before", "after", "after_warm_up"}


def test_side_effects_before_the_first_edit_and_at_the_end(data, tmp_path):
    (tmp_path / "text.txt").write_text("One, two, three. " * 20)
    options = {"perplexity": {"text": str(tmp_path / "text.txt")}, "window": 32, "at": "end"}
    document = bench(data, tmp_path / "out", side_effects=options)[0]
    before, between, after = (entry["side_effects"] for entry in document["checkpoints"])
    assert between is None and before["perplexity"].keys() == after["perplexity"].keys() == {"text"}
    assert before["perplexity"] != after["perplexity"]
    assert document["cost"]["side_effects_seconds"] > 0
    with pytest.raises(ValueError, match="perplexity"):
        bench(data, tmp_path / "other", side_effects={"perplexities": {}})
    assert not (tmp_path / "other").exists()


def test_samples_are_of_the_size_asked_for_and_grow_with_the_stream():
    small, large = set(sample_positions(0, 1000, 100, 3)), set(sample_positions(0, 1200, 100, 3))
    assert len(small) == len(large) == 100
    assert len(small & large) > 70
    assert large & small == {position for position in large if position < 1000}
    assert small != set(sample_positions(0, 1000, 100, 4))
    assert sample_positions(5, 9, None, 0) == sample_positions(5, 9, 4, 0) == [5, 6, 7, 8]
    assert age_bins(350, 100) == [(0, 100), (100, 200), (200, 350)]
    assert age_bins(40, 100) == [(0, 40)]
    assert age_bins(400, 100) == [(0, 100), (100, 200), (200, 400)]


def test_the_unedited_model_answers_each_unrelated_prompt_once(data, tmp_path):
    """For all checkpoints and all editors of a stream; with the default metrics, free answers are scored as well."""

    def prompts_written(editors: list[str], **changes) -> tuple[int, dict]:
        (model, tokenizer), rows = load("tiny"), []
        generate = model.generate

        def counted(input_ids, **how):
            rows.append(len(input_ids))
            return generate(input_ids=input_ids, **how)

        model.generate = counted
        runs = matrix(data, editors=editors, **changes).runs()
        documents = run_matrix(runs, tmp_path / "-".join(editors), lambda _name: (model, tokenizer), progress=False)
        return sum(rows), documents[0]

    one, document = prompts_written(["one-pass"])
    assert one == 40  # edits, each with an unrelated prompt of its own, and two checkpoints after the first
    assert prompts_written(["one-pass", "no-ln"])[0] == one
    assert document["checkpoints"][0]["scores"]["locality_same"]["mean"] == 1
    last = document["checkpoints"][-1]["scores"]
    assert last["locality_same"]["mean"] < last["locality_agreement"]["mean"] < 1
    metrics = {"metrics": Matrix(datasets=["zsre"], models=["tiny"]).metrics, "sample": 5, "age_sample": 1}
    scores = prompts_written(["ultraedit"], **metrics)[1]["checkpoints"][-1]["scores"]
    assert {"efficacy", "efficacy_free", "generalization_contains", "locality_same"} <= set(scores)


def test_retention_by_age_is_scored_on_a_sample(data, tmp_path):
    document = bench(data, tmp_path / "out", sample=5, age_sample=4)[0]
    last = document["checkpoints"][-1]
    assert last["scores"]["efficacy"]["count"] == 5
    assert [(age["from"], age["to"]) for age in last["ages"]] == [(0, 10), (10, 20), (20, 40)]
    assert all(age["scores"]["efficacy"]["count"] >= 4 for age in last["ages"])
    records = lines(tmp_path / "out" / document["name"] / "requests" / "00000040.jsonl")
    assert sum(record["in_sample"] for record in records) == 5
    for age in last["ages"]:
        within = [r["efficacy"] for r in records if age["from"] <= r["age"] < age["to"]]
        assert age["scores"]["efficacy"]["mean"] == pytest.approx(sum(within) / len(within))


def test_a_seed_shuffles(data, tmp_path):
    orders = [[r.subject for r in find_source("zsre", data=data, seed=s, shuffle=8).requests()] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(map(str, range(60)))
    documents = bench(data, tmp_path / "out", seeds=[0, 1], shuffle=8)
    assert [document["name"][-5:] for document in documents] == ["seed0", "seed1"]


def test_matrix_of_everything(data):
    other = {"name": "mine", "edits": str(data / "zsre" / "zsre_edit.json"), "warm_up": None}
    runs = Matrix(
        editors=["one-pass", {"name": "strong", "editor": "one-pass", "step_size": "1e-3"}, "no-warm-up"],
        datasets=["zsre", other],
        models=["a/b", "c"],
        seeds=[0, 1],
        data=str(data),
        warm_up_data=str(data / "zsre" / "zsre_train.json"),
        warm_up_size=10,
    ).runs(progress=False)
    assert len({run.name for run in runs}) == len(runs) == 3 * 2 * 2 * 2
    strong = next(run for run in runs if run.editor.name == "strong")
    assert strong.editor.config.step_size == 1e-3
    assert strong.name == "strong-zsre-b-seed0"
