"""Audits say what evaluation says; repairs bring back what was forgotten, within their budget."""

from __future__ import annotations

import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.lifelong.audit import audit, current
from stableedit_cpp.lifelong.repair import repair
from stableedit_cpp.model.tokens import collate
from support.captures import sequences_of
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, tiny_model

CLOSED = {"step_size": 1e-3, "whitening": "diagonal", "max_passes": 4, "past_key_weight": 0.02}


@pytest.fixture(scope="module")
def knowledge(tokenizer) -> dict[str, torch.Tensor]:
    """Weights of a tiny model that knows all the facts by heart; a random one learns next to nothing from edits."""
    model = tiny_model("llama")
    batch = collate(sequences_of(tokenizer, FACTS), torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1)[batch.positions], batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def knowing_editor(tokenizer, knowledge, disturbance: float = 0.0, **changes):
    """An editor of that model; some facts are forgotten where its weights are disturbed."""
    model = tiny_model("llama")
    model.load_state_dict(knowledge)
    with torch.no_grad():
        for name in MODULES:
            weight = model.get_submodule(name).weight
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight += disturbance * weight.std() * noise
    return make(tokenizer, model, **(CLOSED | changes))


@pytest.fixture
def knowing(tokenizer, knowledge):
    return knowing_editor(tokenizer, knowledge)


@pytest.fixture
def forgetful(tokenizer, knowledge):
    editor = knowing_editor(tokenizer, knowledge, disturbance=0.7)
    assert 3 <= len(audit(editor, FACTS).forgotten) <= 10
    return editor


class TestAudit:
    def test_agrees_with_evaluation(self, tokenizer, forgetful):
        editor = forgetful
        before = state_of(editor)
        scores = se.evaluate(editor.model, tokenizer, FACTS)
        report = audit(editor, FACTS)
        assert [entry.accuracy for entry in report.entries] == [r["efficacy"] for r in scores.per_request]
        assert report.efficacy == pytest.approx(scores.efficacy)
        assert report.forgotten == [i for i, r in enumerate(scores.per_request) if r["efficacy"] < 1]
        assert report.held_share == 1 - len(report.forgotten) / len(FACTS)
        assert_same_bits(state_of(editor), before)

    def test_probability_is_that_of_the_least_likely_answer_token(self, tokenizer):
        editor = make(tokenizer)
        request = se.EditRequest("The sky is", "blue")
        ids = tokenizer(request.prompt)["input_ids"]
        answer = tokenizer(" " + request.target, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = editor.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        likely = logits.softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
        (entry,) = audit(editor, [request]).entries
        assert entry.probability == pytest.approx(float(likely.min()), rel=1e-4)

    def test_min_probability(self, tokenizer, knowing):
        editor = knowing
        plain = audit(editor, FACTS)
        least = sorted(entry.probability for entry in plain.entries if entry.holds)[3]
        strict = audit(editor, FACTS, min_probability=least)
        assert len(strict.forgotten) == 3 and plain.forgotten == []
        by_config = make(tokenizer, editor.model, take_probability=least)
        assert audit(by_config, FACTS).forgotten == strict.forgotten

    def test_sample_is_drawn_by_seed(self, tokenizer):
        editor = make(tokenizer)
        first, again, other = (audit(editor, FACTS, sample=6, seed=seed) for seed in (0, 0, 1))
        assert len(first.entries) == 6 and first.requests == len(FACTS)
        assert first == again and first != other
        whole = {entry.index: entry for entry in audit(editor, FACTS).entries}
        for entry in first.entries:
            assert entry.index == whole[entry.index].index and entry.accuracy == whole[entry.index].accuracy
        assert len(audit(editor, FACTS, sample=100).entries) == len(FACTS)

    def test_superseded_requests_are_left_out(self, tokenizer):
        requests = [*FACTS, FACTS[3] | {"target": "Volga"}, FACTS[3] | {"target": "Don"}]
        assert current(se.data.request.as_requests(requests)) == [0, 1, 2, *range(4, 13), 14]
        report = audit(make(tokenizer), requests)
        assert report.superseded == 2 and report.requests == 13
        assert "2 superseded" in str(report)

    def test_a_request_holds_with_all_its_variants(self, forgetful):
        """Facts in groups hold where all of them do alone."""
        alone = audit(forgetful, FACTS).entries
        groups = [[0, 1], [2], [3, 4, 5], [6, 7, 8], [9], [10, 11, 12]]
        pairs = [(fact["prompt"], fact["target"]) for fact in FACTS]
        requests = [se.EditRequest(*pairs[first], variants=[pairs[i] for i in rest]) for first, *rest in groups]
        report = audit(forgetful, requests)
        for entry, (first, *rest) in zip(report.entries, groups, strict=True):
            assert entry.holds == all(alone[i].holds for i in (first, *rest))
            assert entry.lost_variants == [FACTS[i]["prompt"] for i in rest if not alone[i].holds]
            assert entry.accuracy == alone[first].accuracy
            assert entry.probability == min(alone[i].probability for i in (first, *rest))
        assert any(
            entry.lost_variants and alone[first].holds
            for entry, (first, *_) in zip(report.entries, groups, strict=True)
        )
        before = len(report.forgotten)
        assert len(repair(forgetful, requests, rounds=3).after.forgotten) < before

    def test_what_a_later_request_answers_otherwise_is_left_to_it(self, tokenizer, forgetful):
        first = {**FACTS[0], "variants": [("Gold is", "Ag"), ("Snow is", "white")]}
        solved = []
        forgetful.on_turn = lambda turn: solved.extend(turn.requests)
        report = repair(forgetful, [first, FACTS[1]], min_probability=0.9999)
        assert solved == se.data.request.as_requests([first | {"variants": [("Snow is", "white")]}, FACTS[1]])
        assert (report.before.requests, report.before.superseded) == (2, 0)

    def test_trunk_gives_the_same(self, tokenizer):
        editor = make(tokenizer, edit_modules=MODULES[1:])
        trunk = se.TrunkCache(editor.model, editor.modules)
        plain = audit(editor, FACTS)
        assert audit(editor, FACTS, trunk=trunk) == plain  # fills it
        assert audit(editor, FACTS, trunk=trunk) == plain  # uses it
        assert len(trunk) == len(FACTS)

    def test_report(self, tokenizer):
        report = audit(make(tokenizer), [FACTS[0] | {"id": "capital"}, FACTS[1]])
        assert [entry.id for entry in report.entries] == ["capital", "1"]
        document = json.loads(json.dumps(report.to_dict()))
        assert document["audited"] == 2 and len(document["entries"]) == 2
        assert str(audit(make(tokenizer), [])) == "there is no request to audit"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"sample": 0}, ["sample", "0"]),
            ({"sample": True}, ["sample", "True"]),
            ({"min_probability": 1.0}, ["min_probability", "1.0"]),
            ({"min_probability": -0.1}, ["min_probability", "-0.1"]),
        ],
    )
    def test_refusals(self, arguments, words, tokenizer):
        with pytest.raises(ValueError) as error:
            audit(make(tokenizer), FACTS, **arguments)
        assert all(word in str(error.value) for word in words)


class TestRepair:
    def test_brings_back_what_was_forgotten(self, forgetful):
        editor = forgetful
        report = repair(editor, FACTS, rounds=3)
        assert report.after.held_share == 1.0
        assert report.after == audit(editor, FACTS)
        assert len(report.audits) == len(report.rounds) + 1
        assert [done.edits for done in report.rounds] == [len(found.forgotten) for found in report.audits[:-1]]
        assert json.loads(json.dumps(report.to_dict()))["left_out"] == 0
        assert "solved again" in str(report)

    def test_only_the_forgotten_are_solved(self, forgetful):
        editor = forgetful
        forgotten = audit(editor, FACTS).forgotten
        turns = []
        editor.on_turn = turns.append
        repair(editor, FACTS)
        solved = [request.prompt for turn in turns for request in turn.requests]
        assert solved == [FACTS[index]["prompt"] for index in forgotten]
        assert {turn.kind for turn in turns} == {"repair"}

    def test_budget_takes_those_nearest_to_holding(self, forgetful):
        editor = forgetful
        found = audit(editor, FACTS)
        wrong = sorted((entry for entry in found.entries if not entry.holds), key=lambda entry: -entry.probability)
        turns = []
        editor.on_turn = turns.append
        report = repair(editor, FACTS, rounds=2, budget=2)
        solved = [request.prompt for turn in turns for request in turn.requests]
        assert solved == [FACTS[index]["prompt"] for index in sorted(entry.index for entry in wrong[:2])]
        assert len(report.rounds) == 1 and report.left_out == len(wrong) - 2

    def test_a_margin_makes_answers_likelier(self, tokenizer, knowledge):
        passes, likely = [], []
        for least in (0.0, 0.9):
            editor = knowing_editor(tokenizer, knowledge, 0.7, take_probability=least, max_passes=20, turn_size=13)
            (turn,) = repair(editor, FACTS).rounds[0].turns
            passes.append(turn.passes)
            likely.append(min(entry.probability for entry in audit(editor, FACTS).entries))
        assert passes[0] < passes[1] < 20
        assert likely[0] < 0.9 <= likely[1]

    def test_nothing_to_repair(self, knowing):
        editor = knowing
        before = state_of(editor)
        report = repair(editor, FACTS, rounds=2)
        assert report.rounds == [] and report.before is report.after
        assert_same_bits(state_of(editor), before)

    def test_the_superseded_are_not_brought_back(self, forgetful):
        editor = forgetful
        requests = [FACTS[0] | {"target": "Sydney"}, *FACTS]
        turns = []
        editor.on_turn = turns.append
        repair(editor, requests)
        assert all(request.target != "Sydney" for turn in turns for request in turn.requests)

    @pytest.mark.parametrize("arguments", [{"rounds": 0}, {"rounds": 1.5}, {"budget": 0}, {"budget": True}])
    def test_refusals(self, arguments, tokenizer):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1(, or None)?, not {value!r}"):
            repair(make(tokenizer), FACTS, **arguments)
