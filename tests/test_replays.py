"""Replays: statements of earlier turns in the same solution as those of a turn, and the state that remembers them."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors.replays import PastRequests, Replays
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.tokens import TokenSequence
from support.captures import sequences_of
from support.editors import MODULES, assert_same_bits, make, saved_on_the_way, state_of, weight_of
from support.tiny import FACTS, tiny_model

CLOSED = {"step_size": "auto", "centred": False, "max_passes": 6, "retries_feed_statistics": False}


def sequence(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenSequence:
    return TokenSequence(prompt + answer[:-1], answer)


def past_of(*requests: list[TokenSequence]) -> PastRequests:
    past = PastRequests()
    for sequences in requests:
        past.add(sequences, [0] * len(sequences))
    return past


class TestPastRequests:
    ONE, TWO, NEW = sequence((1, 2), (3, 4)), sequence((5,), (6,)), sequence((1, 2), (9,))
    VARIANT = sequence((7, 8), (3, 4))

    def test_of_statements_with_one_prompt_the_last_counts(self):
        assert list(past_of([self.ONE], [self.TWO], [self.NEW])) == [self.TWO, self.NEW]

    def test_who_asks_a_request_anew_replaces_its_variants_too(self):
        past = past_of([self.ONE, self.VARIANT], [self.TWO])
        assert past.beside([self.NEW]) == [self.TWO]
        past.add([self.NEW], [0])
        assert list(past) == [self.TWO, self.NEW]

    def test_who_asks_a_variant_takes_only_that(self):
        past = past_of([self.ONE, self.VARIANT])
        past.add([sequence((7, 8), (9,))], [0])
        assert list(past) == [self.ONE, sequence((7, 8), (9,))]
        past.add([self.NEW], [0])  # the other one does not go with it
        assert list(past) == [sequence((7, 8), (9,)), self.NEW]

    def test_requests_of_a_turn_are_apart(self):
        past = PastRequests()
        past.add([self.ONE, self.VARIANT, self.TWO], [0, 0, 1])
        assert past.beside([self.TWO]) == [self.ONE, self.VARIANT]

    @pytest.mark.parametrize("held", [[], [[ONE, VARIANT]], [[TWO], [ONE, VARIANT]]])
    def test_a_state_gives_them_back(self, held):
        past = past_of(*held)
        state = past.state_dict()
        again = PastRequests.from_state_dict(state)
        assert {tensor.dtype for tensor in state.values()} == {torch.int32}
        assert list(again) == list(past) and again.beside([self.NEW]) == past.beside([self.NEW])

    def test_a_state_says_nothing_of_what_is_gone(self):
        """So that an editor that was saved in between has the same one."""
        past = past_of([self.TWO], [self.ONE])
        past.forget([self.TWO])
        fresh = past_of([self.ONE])
        assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in past.state_dict().items())

    def test_a_state_that_does_not_fit_is_refused(self):
        state = past_of([self.ONE]).state_dict()
        with pytest.raises(ValueError, match="past requests have 3 tokens, not the 4"):
            PastRequests.from_state_dict(state | {"tokens": state["tokens"][1:]})

    def test_a_copy_stays_as_it_was(self):
        past = past_of([self.ONE])
        copy = past.copy()
        past.add([self.TWO], [0])
        assert list(copy) == [self.ONE]
        past.restore(copy)
        assert list(past) == [self.ONE]


def test_rows_are_those_of_their_own_capture_and_belong_to_nobody(tokenizer):
    editor = make(tokenizer, **CLOSED)
    now, before = sequences_of(tokenizer)[:2], sequences_of(tokenizer)[2:]
    replays = Replays(editor.model, editor.modules, count=100, micro_batch=10, max_tokens=2048)
    replays.begin(now, past_of(before))
    captured = capture(editor.model, editor.modules, now, max_tokens=2048)
    joined = replays.join(captured, now)
    alone = capture(editor.model, editor.modules, before, max_tokens=2048)
    own = len(captured.request)
    assert joined.request[own:].unique().tolist() == [-1] and joined.loss == pytest.approx(captured.loss + alone.loss)
    for name, gradients in joined.value_gradients.items():
        assert torch.equal(gradients[:own], captured.value_gradients[name])
        # In whatever order they were drawn.
        torch.testing.assert_close(
            gradients[own:].T @ joined.keys[name][own:], alone.value_gradients[name].T @ alone.keys[name]
        )


def test_earlier_requests_hold_longer(tokenizer):
    """The mean log-probability of their answers at the end of a stream, with and without."""
    found = []
    for count in (0, 16):
        editor = make(tokenizer, **CLOSED, replays=count, turn_size=1)
        editor.edit(FACTS, progress=False)
        scores = answer_scores(editor.model, sequences_of(tokenizer, FACTS[:-1]), max_tokens=2048)
        found.append(float(scores.probability.log().mean()))
    assert found[1] > found[0]


def test_the_same_stream_gives_the_same_bits(tokenizer, tmp_path):
    one, loaded = saved_on_the_way(tokenizer, tmp_path, **CLOSED, replays=4)
    assert torch.equal(weight_of(one), weight_of(loaded))
    assert list(one.solver.past_requests) == list(loaded.solver.past_requests)


def test_a_turn_can_be_done_again(tokenizer):
    turns = []
    editor, again = make(tokenizer, **CLOSED, replays=4), make(tokenizer, **CLOSED, replays=4)
    editor.on_turn = turns.append
    editor.edit(FACTS, progress=False)
    for turn in turns:
        again.replay(turn)
    assert_same_bits(state_of(again), state_of(editor))
    assert list(again.solver.past_requests) == list(editor.solver.past_requests)
    once_more = make(tokenizer, **CLOSED, replays=4)
    for turn in turns:
        once_more.edit_again(turn.requests, turn.kind, len(turn.passes))
    assert_same_bits(state_of(once_more), state_of(editor))


def test_a_turn_taken_back_is_not_remembered(tokenizer):
    editor = make(tokenizer, **CLOSED, replays=4)

    def refuse(_turn):
        raise RuntimeError("no")

    editor.on_turn = refuse
    with pytest.raises(RuntimeError, match="no"):
        editor.edit(FACTS[:2], progress=False)
    assert len(editor.solver.past_requests) == 0


def test_a_session_replays_nothing_that_was_reverted(tokenizer, tmp_path):
    """Also after it was opened again, from its journal alone."""
    model = tiny_model("llama")
    requests = [se.EditRequest(**FACTS[index], id=str(index)) for index in range(4)]
    config = se.StableEditConfig.one_pass(edit_modules=MODULES, **CLOSED, replays=4)
    with se.LifelongSession.create(tmp_path / "session", model, tokenizer, config) as session:
        session.edit(requests, progress=False)
        session.revert("1", progress=False)
        held = list(session.editor.solver.past_requests)
        assert len(held) == 3 and session.editor.tokenize([requests[1]])[0] not in held
    with se.LifelongSession.open(tmp_path / "session", tiny_model("llama"), tokenizer) as session:
        assert list(session.editor.solver.past_requests) == held
