"""How a stream is cut into turns, and what its report says about each request."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stableedit_cpp as se
from stableedit_cpp.editors.stream import turns_of
from stableedit_cpp.editors.work import Work
from support.editors import MODULES, TURN, assert_same_bits, make, on_call, state_of
from support.tiny import FACTS


def said(model, tokenizer, prompt: str, count: int) -> list[int]:
    """Greedy decoding, one token after the other, without batches, padding or caches."""
    ids = tokenizer(prompt)["input_ids"]
    with torch.inference_mode():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def answer_of(tokenizer, target: str) -> list[int]:
    return tokenizer(" " + target, add_special_tokens=False)["input_ids"]


def pieces_as_sessions_had_them(requests, turn_size):
    """The cut that sessions made before there was one for every editor: a piece is cut into turns by size."""
    pieces, turn = [[]], set()
    for request in requests:
        question = request.prompt.strip()
        if len(turn) == turn_size:
            turn = set()
        elif question in turn:
            turn = set()
            pieces.append([])
        turn.add(question)
        pieces[-1].append(request)
    return [piece[i : i + turn_size] for piece in pieces for i in range(0, len(piece), turn_size)]


class TestCutting:
    @given(st.lists(st.sampled_from(["a", "b", "c\n", "c", "d"]), max_size=30), st.integers(1, 6))
    def test_is_that_of_earlier_sessions(self, prompts, turn_size):
        requests = [se.EditRequest(prompt, str(number)) for number, prompt in enumerate(prompts)]
        turns = [requests[part] for part in turns_of(requests, turn_size)]
        assert turns == pieces_as_sessions_had_them(requests, turn_size)
        assert [request for turn in turns for request in turn] == requests
        for turn in turns:
            assert len({request.question for request in turn}) == len(turn) <= turn_size

    def test_of_two_answers_the_later_sees_the_earlier_one_done(self, tokenizer):
        first, second = FACTS[0], {"prompt": f"{FACTS[0]['prompt']}\n", "target": "quite another"}
        together, apart = make(tokenizer), make(tokenizer)
        report = together.edit([first, FACTS[1], second, FACTS[2]])
        apart.edit([first, FACTS[1]])
        apart.edit([second, FACTS[2]])
        assert [turn.requests for turn in report.turns] == [2, 2]
        assert_same_bits(state_of(together), state_of(apart))

    def test_bad_requests_are_named_by_their_place_in_the_call(self, tokenizer):
        with pytest.raises(ValueError, match="request 6"):
            make(tokenizer).edit([*FACTS[:3], *FACTS[:3], {"prompt": "x" * 100, "target": "y"}])


# Some take and some do not.
HALF = {"max_passes": 20, "whitening": "none", "step_size": 100.0, "turn_size": 2}


class TestOutcomes:
    @pytest.mark.parametrize("settings", [{}, HALF, HALF | {"take_probability": 0.15}], ids=["one", "loop", "sure"])
    def test_are_what_the_model_says_after_each_turn(self, settings, tokenizer):
        editor = make(tokenizer, **settings)
        expected = []

        def look(turn) -> None:
            for request in turn.requests:
                target = answer_of(tokenizer, request.target)
                answer = said(editor.model, tokenizer, request.prompt, len(target))
                ids = tokenizer(request.prompt)["input_ids"] + target
                with torch.inference_mode():
                    logits = editor.model(torch.tensor([ids])).logits[0, -len(target) - 1 : -1]
                likely = logits.double().softmax(-1)[range(len(target)), target].min()
                took = answer == target and likely >= settings.get("take_probability", 0.0)
                expected.append((took, None if took else tokenizer.decode(answer, skip_special_tokens=True).strip()))

        editor.on_turn = look
        report = editor.edit(FACTS, outcomes=True)
        outcomes = report.outcomes
        assert [(outcome.took, outcome.answer) for outcome in outcomes] == expected
        assert [outcome.index for outcome in outcomes] == list(range(13))
        assert [outcome.request.prompt for outcome in outcomes] == [fact["prompt"] for fact in FACTS]
        assert report.failed == [outcome.request for outcome in outcomes if not outcome.took]
        if settings == HALF:
            assert 0 < len(report.failed) < 13
        if "take_probability" in settings:
            assert any(not outcome.took and outcome.answer == outcome.request.target for outcome in outcomes)
        assert str(report).endswith(f"; {len(report.failed)} did not take")
        assert all(turn.seconds["outcomes"] > 0 for turn in report.turns)

    def test_what_failed_can_be_edited_again(self, tokenizer):
        editor = make(tokenizer, **HALF | {"max_passes": 10})
        first = editor.edit(FACTS)
        second = editor.edit(first.failed)
        assert second.requests == first.failed and len(second.failed) < len(first.failed)

    def test_nobody_looks_where_that_would_cost_much(self, tokenizer):
        looking, plain, loop = make(tokenizer), make(tokenizer), make(tokenizer, max_passes=2)
        looking.edit(FACTS, outcomes=True)
        report = plain.edit(FACTS)
        assert_same_bits(state_of(looking), state_of(plain))
        assert all(turn.failed is None and "outcomes" not in turn.seconds for turn in report.turns)
        for asked in ("failed", "outcomes"):
            with pytest.raises(ValueError, match="nobody looked which requests took"):
                getattr(report, asked)
        assert loop.warm_up(FACTS).turns[0].failed is None
        report = loop.edit(FACTS)
        assert len(report.failed) == sum(len(turn.failed) for turn in report.turns) > 0
        assert all(outcome.answer is None for outcome in report.outcomes)
        assert loop.edit(FACTS, outcomes=False).turns[0].failed is None

    def test_go_through_json_and_old_records_are_read(self, tokenizer):
        report = make(tokenizer).edit(FACTS, outcomes=True)
        for turn, written in zip(report.turns, json.loads(json.dumps(report.to_dict()))["turns"], strict=True):
            assert se.TurnReport(**written) == turn
            del written["failed"]
            assert se.TurnReport(**written).failed is None
        assert "requests" not in report.to_dict() and "prompt" not in repr(report)


class TestSeconds:
    def test_do_not_depend_on_the_terminal(self, tokenizer, monkeypatch):
        real = Work.accuracy

        def slow(*arguments, **options):
            time.sleep(0.5)
            return real(*arguments, **options)

        monkeypatch.setattr(Work, "accuracy", slow)
        report = make(tokenizer).edit(FACTS[:TURN], progress=True)
        assert report.turns[0].efficacy_after is not None
        assert sum(report.turns[0].seconds.values()) <= report.seconds < sum(report.turns[0].seconds.values()) + 0.4


class TestWhatEndsAStream:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), se.ModelBroken("a sentence"), MemoryError()], ids=repr)
    def test_has_the_report_of_the_turns_before(self, error, tokenizer, monkeypatch):
        def fail():
            raise error

        on_call(monkeypatch, 3, fail)
        editor = make(tokenizer)
        with pytest.raises(type(error)) as stop:
            editor.edit(FACTS)
        assert [turn.requests for turn in stop.value.report.turns] == [TURN, TURN]
        assert list(stop.value.report.requests)[: stop.value.report.edits] == se.data.request.as_requests(FACTS[:10])
        assert list(editor.weights) == MODULES
