"""Variants of a request: how they are given and read, and that an editor treats them and their request as one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.data import FORMATS, describe
from stableedit_cpp.data.superseding import current_parts
from support.editors import assert_same_bits, make, state_of
from support.tiny import FACTS
from test_outcomes import HALF, answer_of, said

PROMPT, TARGET = "The capital of Australia is", "Canberra"
REVERSED = ("Canberra is the capital of", "Australia")


def request_of(*variants, **fields) -> se.EditRequest:
    return se.EditRequest(PROMPT, TARGET, variants=variants, **fields)


class TestForms:
    @pytest.mark.parametrize(
        "variants",
        [
            ["Australia's capital:", REVERSED],
            (("Australia's capital:", "Canberra"), list(REVERSED)),
            [
                {"prompt": " Australia's capital:", "target": "Canberra "},
                {"prompt": REVERSED[0], "target": REVERSED[1]},
            ],
            ["Australia's capital:", REVERSED, REVERSED, PROMPT, f"{PROMPT}\n", (PROMPT, TARGET)],
        ],
        ids=["bare text", "pairs", "objects, blanks", "said before"],
    )
    def test_are_pairs_in_order(self, variants):
        request = request_of(*variants)
        assert request.variants == (("Australia's capital:", "Canberra"), REVERSED)
        assert request.statements == ((PROMPT, TARGET), *request.variants)
        assert hash(request) == hash(request_of("Australia's capital:", REVERSED)) != hash(request_of())

    def test_one_text_is_one_paraphrase(self):
        assert se.EditRequest("p", "t", variants="q").variants == (("q", "t"),)

    @pytest.mark.parametrize("variants", [None, (), [], "", [PROMPT]])
    def test_none_is_none(self, variants):
        request = se.EditRequest(PROMPT, TARGET, variants=variants)
        assert request == se.EditRequest(PROMPT, TARGET) and "variants" not in request.to_dict()

    @pytest.mark.parametrize(
        ("variant", "words"),
        [
            (("Canberra is the capital of", ""), "variants[1] ('Canberra is the capital of') has no target; give"),
            (("Canberra is the capital of", None), "has no target"),
            (("Canberra is the capital of",), "has no target; give the answer, or the prompt alone as a text"),
            ({"prompt": "Canberra is the capital of"}, "has no target"),
            ("  ", "variants[1]: prompt is empty"),
            (("", "Australia"), "variants[1]: prompt is empty"),
            ((3, "Australia"), "variants[1]: prompt must be text, not int (3)"),
            (("q", 3), "variants[1]: target must be text, not int (3)"),
            (("q", "\ud800"), "variants[1]: target is not valid Unicode"),
            (("a", "b", "c"), "variants[1] must be a pair (prompt, target)"),
            ({"prompt": "q", "answer": "a"}, "variants[1] must be a pair (prompt, target)"),
            (5, "variants[1] must be a pair (prompt, target)"),
            (
                (PROMPT, "Sydney"),
                "variants[1] answers 'The capital of Australia is' with 'Sydney', but the request has",
            ),
            (
                ("first", "Sydney"),
                "variants[1] answers 'first' with 'Sydney', but the request has the target 'Canberra'",
            ),
        ],
    )
    def test_a_bad_one_is_named(self, variant, words):
        with pytest.raises(ValueError) as error:
            request_of("first", variant)
        assert words in str(error.value)

    @pytest.mark.parametrize("variants", [5, b"text", {"prompt": "q", "target": "t"}])
    def test_what_is_no_list_is_refused(self, variants):
        with pytest.raises(ValueError, match="variants must be a list of"):
            se.EditRequest("p", "t", variants=variants)


REQUESTS = [request_of("Australia's capital:", REVERSED, id="a"), se.EditRequest("p", "t", id="b")]
# As WikiBigEdit has them.
HOP = {"update": "p", "ans": "t", "rephrase": "r", "personas": "arr p", "mhop": "m", "mhop_ans": "u", "loc": "l"}


class TestFiles:
    @pytest.mark.parametrize("suffix", ["json", "jsonl"])
    def test_json_gives_back_what_to_dict_says(self, suffix, tmp_path):
        records = [request.to_dict() for request in REQUESTS]
        path = tmp_path / f"edits.{suffix}"
        path.write_text(json.dumps(records) if suffix == "json" else "\n".join(map(json.dumps, records)))
        assert se.read_requests(path) == REQUESTS

    def test_a_table_has_numbered_columns(self, tmp_path):
        path = tmp_path / "edits.csv"
        path.write_text(
            "id,prompt,target,variant_1,variant_1_target,variant_2,variant_2_target\n"
            f"a,{PROMPT},{TARGET},Australia's capital:,,{','.join(REVERSED)}\n"
            "b,p,t,,,,\n"
        )
        assert se.read_requests(path) == REQUESTS
        assert describe(path).unused == []

    def test_a_target_in_a_table_needs_its_variant(self, tmp_path):
        path = tmp_path / "edits.csv"
        path.write_text("prompt,target,variant_1,variant_1_target\np,t,,u\n")
        with pytest.raises(ValueError, match=r"line 2: variant_1_target is given without variant_1,"):
            se.read_requests(path)

    def test_own_field_names(self, tmp_path):
        path = tmp_path / "edits.json"
        path.write_text(json.dumps([{"question": "p", "answer": "t", "para": ["q", "r"]}]))
        fields = {"prompt": "question", "target": "answer", "variants": "para"}
        assert se.read_requests(path, format=fields) == [se.EditRequest("p", "t", variants=["q", "r"])]


class TestQuestionsOfDataSets:
    """Those that are named become variants, and are gone as questions."""

    def read(self, tmp_path, record, variants, **how):
        path = tmp_path / "data.json"
        path.write_text(json.dumps([record]))
        return se.read_requests(path, variants=variants, **how)[0]

    def test_one_and_all(self, tmp_path):
        request = self.read(tmp_path, HOP, ["rephrase"])
        assert request.variants == (("r", "t"),)
        assert (request.rephrase, request.multi_hop_prompt, request.multi_hop_target) == (None, "m", "u")
        request = self.read(tmp_path, HOP, ["multi_hop", "persona", "rephrase"])
        assert request == se.EditRequest(
            "p", "t", locality_prompt="l", variants=[("m", "u"), ("arr p", "t"), ("r", "t")]
        )
        assert next(iter(se.iter_requests(tmp_path / "data.json", variants=["rephrase"]))).variants == (("r", "t"),)

    def test_what_a_record_lacks_is_no_variant(self, tmp_path):
        record = HOP | {"mhop_ans": None, "rephrase": None}
        request = self.read(tmp_path, record, ["rephrase", "multi_hop"])
        assert request.variants == () and request.multi_hop_prompt is None

    def test_of_several_paraphrases_all(self, tmp_path):
        record = {"prompt": "p", "alt": "t", "equiv_prompt": ["q", "r", "p"], "unrel_prompt": "l"}
        assert self.read(tmp_path, record, ["rephrase"]).variants == (("q", "t"), ("r", "t"))

    def test_those_of_the_record_come_first(self, tmp_path):
        record = request_of(REVERSED, rephrase="r").to_dict()
        assert self.read(tmp_path, record, ["rephrase"]) == request_of(REVERSED, "r")

    @pytest.mark.parametrize("name", ["prompt", "locality", "rephrased"])
    def test_only_what_follows_from_the_edit(self, name, tmp_path):
        with pytest.raises(ValueError, match="known are: rephrase, persona, multi_hop"):
            self.read(tmp_path, HOP, [name])

    def test_a_format_without_it_is_refused(self, tmp_path):
        record = {"src": "p", "ans": "t", "rephrase": "r", "loc": "l", "loc_ans": "a"}
        with pytest.raises(ValueError, match=r"the zsre format has no multi_hop_prompt .*; it has rephrase"):
            self.read(tmp_path, record, ["multi_hop"])
        assert [f.name for f in FORMATS if "rephrase" not in f.fields] == []


class TestSuperseding:
    def test_the_last_request_that_asks_a_question_has_it(self):
        requests = [
            se.EditRequest("a", "1", variants=["b", "c"]),
            se.EditRequest("d", "2", variants=[("b", "9")]),
            se.EditRequest("e", "3", variants=["x"]),
            se.EditRequest("f", "4", variants=[("e\n", "5")]),
        ]
        parts = current_parts(requests)
        assert parts == {0: se.EditRequest("a", "1", variants=["c"]), 1: requests[1], 3: requests[3]}

    def test_contradictions_are_said_once(self, tokenizer):
        first = [{**FACTS[0], "variants": [("Gold is", "Ag"), ("Snow is", "white")]}, *FACTS[1:3], FACTS[12]]
        with pytest.warns(UserWarning) as said:
            report = make(tokenizer).edit([*first, {**FACTS[2], "target": "B"}])
        (warning,) = said
        assert str(warning.message) == (
            "2 requests contradict an earlier one of the same call, and the later wins; request 1 answers 'Gold is' "
            "with 'Au' instead of 'Ag'"
        )
        assert [turn.requests for turn in report.turns] == [1, 3, 1]

    def test_agreement_is_no_contradiction(self, tokenizer, recwarn):
        make(tokenizer).edit([FACTS[0], {**FACTS[1], "variants": [(FACTS[0]["prompt"], FACTS[0]["target"])]}])
        assert not recwarn.list


# Three facts, of which the first two have further statements, and the same as one list of plain requests.
WITH = [
    {**FACTS[0], "variants": ["Australia's capital:", REVERSED]},
    {**FACTS[1], "variants": [("Au is", "gold")]},
    FACTS[2],
]
APART = [
    {"prompt": prompt, "target": target}
    for request in map(se.EditRequest.from_record, WITH)
    for prompt, target in request.statements
]


class TestEditing:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            HALF,
            {"max_passes": 4, "take_probability": 0.1, "past_key_weight": 0.1},
            {"max_passes": 3, "step_size": "auto", "prompt_rows": True, "end_of_answer": True, "centred": False},
        ],
        ids=["one pass", "often", "sure", "automatic"],
    )
    def test_solves_all_statements_together(self, changes, tokenizer):
        together, apart = make(tokenizer, **changes | {"turn_size": 3}), make(tokenizer, **changes | {"turn_size": 6})
        report = together.edit(WITH)
        other = apart.edit(APART)
        assert (report.edits, len(report.turns), report.turns[0].requests) == (3, 1, 3)
        assert report.turns[0].answer_tokens == other.turns[0].answer_tokens
        assert report.turns[0].passes == other.turns[0].passes
        assert_same_bits(state_of(together), state_of(apart))

    def test_rows_belong_to_the_request(self, tokenizer):
        turns = []
        editor = make(tokenizer, **HALF | {"turn_size": 3})
        editor.on_turn = turns.append
        editor.edit(WITH)
        (turn,) = turns
        first = turn.passes[0]
        counts = [sum(len(answer_of(tokenizer, t)) for _, t in request.statements) for request in turn.requests]
        assert torch.bincount(first.request).tolist() == counts
        assert len(turn.passes) > 1  # later ones have rows of some statements only

        # What is left without the rows of the first request is the solution of the others' rows alone.
        for applied in turn.passes:
            owned = applied.request == 0
            if not owned.any():
                continue
            shares = applied.contribution(owned)
            for name, update in applied.updates.items():
                keys, values = applied.captured.keys[name].double()[~owned], None
                whole = applied.captured.keys[name].double()
                gram = whole @ whole.T + applied.ridge * torch.eye(len(whole))
                values = gram @ update.left.double().T
                rest = keys @ keys.T + applied.ridge * torch.eye(len(keys))
                expected = torch.linalg.solve(rest, values[~owned]).T @ keys
                found = (update.dense() - shares[name].dense()).double()
                torch.testing.assert_close(found, expected, atol=1e-4 * float(values.abs().max()), rtol=1e-3)

    @pytest.mark.parametrize("settings", [HALF, HALF | {"max_passes": 2}], ids=["often", "twice"])
    def test_has_taken_only_with_all_its_variants(self, settings, tokenizer):
        editor = make(tokenizer, **settings | {"turn_size": 3})
        report = editor.edit(WITH, outcomes=True)
        expected = []
        for request in map(se.EditRequest.from_record, WITH):
            wrong = {}
            for prompt, target in request.statements:
                answer = said(editor.model, tokenizer, prompt, len(answer_of(tokenizer, target)))
                if answer != answer_of(tokenizer, target):
                    wrong[prompt] = tokenizer.decode(answer, skip_special_tokens=True).strip()
            expected.append(wrong)
        assert any(expected)
        for outcome, wrong in zip(report.outcomes, expected, strict=True):
            assert outcome.took == (not wrong)
            assert outcome.answer == wrong.get(outcome.request.prompt)
            assert outcome.only_variants == (bool(wrong) and outcome.request.prompt not in wrong)
            assert outcome.variants == {p: answer for p, answer in wrong.items() if p != outcome.request.prompt}
        assert [request.prompt for request in report.failed] == [
            outcome.request.prompt for outcome in report.outcomes if not outcome.took
        ]
        assert report.turns[0].taken[-1] <= 3
        document = json.loads(json.dumps(report.to_dict()))
        assert se.TurnReport(**document["turns"][0]) == report.turns[0]

    def test_a_variant_that_cannot_be_edited_is_named(self, tokenizer):
        long = dataclasses.replace(request_of("q", id="a"), variants=["q", "x" * 100])
        with pytest.raises(ValueError, match=r"request 1 \(a\), variant 1: prompt and target have"):
            make(tokenizer).edit([FACTS[1], long])


class TestScores:
    METRICS = ("accuracy", "exact_match", "generation")

    def test_are_those_of_each_variant_alone(self, tokenizer):
        editor = make(tokenizer, **HALF | {"turn_size": 3})
        editor.edit(WITH)
        how = {"metrics": self.METRICS, "progress": False}
        scores = se.evaluate(editor.model, tokenizer, WITH, **how)
        alone = iter(se.evaluate(editor.model, tokenizer, APART, **how).per_request)
        for request, record in zip(map(se.EditRequest.from_record, WITH), scores.per_request, strict=True):
            (own, *variants) = [next(alone) for _ in request.statements]
            for name, value in own.items():
                if name.startswith("efficacy"):
                    assert record[name] == value
            if not variants:
                assert {record[name] for name in scores if name.startswith("variants")} == {None}
                continue
            assert record["variants"] == pytest.approx(sum(v["efficacy"] for v in variants) / len(variants))
            for what in ("exact_match", "free", "contains", "contains_and_stops"):
                assert record[f"variants_{what}"] == float(all(v[f"efficacy_{what}"] for v in variants))
            assert record["variants_text"] == [v["efficacy_text"] for v in variants]
        assert scores.counts()["variants"] == {"scored": 2, "skipped": 1}
        assert scores.variants == scores["variants"].mean is not None
        json.dumps(scores.to_dict())

    def test_are_left_out_where_there_are_none(self, tokenizer):
        scores = se.evaluate(make(tokenizer).model, tokenizer, FACTS[:2], progress=False)
        assert scores.variants is None and not [name for name in scores if "variant" in name]

    def test_a_variant_that_is_too_long_is_named(self, tokenizer):
        with pytest.raises(ValueError, match="request 0, variant 0: prompt and target have"):
            se.evaluate(make(tokenizer).model, tokenizer, [request_of("x" * 100)], progress=False)
