"""Passes, repairs and past keys in the turn loop: what is fed where, and nothing left behind by a failure."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.editors import turn as turns
from stableedit_cpp.evaluation.answers import answer_scores
from support.answers import none_takes
from support.captures import sequences_of
from support.editors import MODULES, TURN, assert_same_bits, make, on_call, state_of, weight_of
from support.tiny import FACTS, tiny_model

CLOSED = {"max_passes": 3, "past_key_weight": 0.05}


def whole_state(editor) -> dict[str, torch.Tensor]:
    state = state_of(editor)
    for name, past in editor.past_keys.items():
        state |= {f"past {name} {field}": tensor.clone() for field, tensor in past.state_dict().items()}
    return state


def fail() -> None:
    raise RuntimeError("broken")


def answer_tokens(tokenizer, requests) -> int:
    return sum(len(sequence.answer) for sequence in sequences_of(tokenizer, requests))


class TestPastKeys:
    def test_each_turn_adds_its_keys_once(self, tokenizer):
        editor = make(tokenizer, **CLOSED)
        assert set(editor.past_keys) == set(MODULES)
        report = editor.edit(FACTS)
        assert any(turn.passes > 1 for turn in report.turns)
        for past in editor.past_keys.values():
            assert past.count == answer_tokens(tokenizer, FACTS)

    def test_they_are_the_keys_of_the_first_pass(self, monkeypatch, tokenizer):
        captured, real = [], turns.capture
        monkeypatch.setattr(turns, "capture", lambda *a, **k: captured.append(real(*a, **k)) or captured[-1])
        editor = make(tokenizer, **CLOSED)
        editor.edit(FACTS[:TURN])
        keys = captured[0].keys[MODULES[1]].double()
        torch.testing.assert_close(editor.past_keys[MODULES[1]].second_moment, keys.T @ keys)

    def test_warm_up_counts_and_repairs_do_not(self, tokenizer):
        editor = make(tokenizer, **CLOSED)
        editor.warm_up(FACTS[:TURN])
        before = answer_tokens(tokenizer, FACTS[:TURN])
        assert editor.past_keys[MODULES[0]].count == before
        editor.repair(FACTS[:TURN])
        assert editor.past_keys[MODULES[0]].count == before

    def test_updates_are_those_of_the_ridge_with_past_keys(self, tokenizer):
        """The second turn, done by hand from the turn's own keys and gradients."""
        editor = make(tokenizer, past_key_weight=0.5, whitening="diagonal", edit_modules=MODULES[:1])
        editor.edit(FACTS[:TURN])
        captured = turns.capture(
            editor.model, editor.modules, sequences_of(tokenizer, FACTS[TURN:10]), micro_batch=10, max_tokens=2048
        )
        name = MODULES[0]
        before, past = weight_of(editor, name).clone(), editor.past_keys[name].second_moment
        editor.edit(FACTS[TURN:10])
        keys = captured.keys[name].double()
        normalizer = editor.normalizers["24 -> 16"]
        scale = normalizer.normalize_keys(captured.keys[name]).double().square().sum(1, keepdim=True)
        gradients = normalizer.normalize_value_gradients(captured.value_gradients[name]).double()
        system = keys.T @ keys + 0.5 * past + editor.config.ridge * torch.eye(24, dtype=torch.float64)
        expected = torch.linalg.solve(system, keys.T @ (-editor.config.step_size * scale * gradients)).T
        torch.testing.assert_close((weight_of(editor, name) - before).double(), expected, rtol=1e-3, atol=1e-7)

    def test_without_weight_there_are_none_and_nothing_changes(self, tokenizer):
        editor = make(tokenizer)
        assert editor.past_keys == {} and editor.solver.module_editors[MODULES[0]].past_keys is None


class TestAllOrNothing:
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_a_failing_pass_takes_the_turn_back(self, number, monkeypatch, tokenizer):
        editor = make(tokenizer, **CLOSED)
        none_takes(monkeypatch)
        editor.edit(FACTS[:TURN])
        before = whole_state(editor)
        with monkeypatch.context() as patch:
            on_call(patch, number, fail)
            with pytest.raises(RuntimeError, match="broken"):
                editor.edit(FACTS[TURN:])
        assert_same_bits(whole_state(editor), before)
        editor.edit(FACTS[TURN:])
        whole = make(tokenizer, **CLOSED)
        whole.edit(FACTS)
        assert_same_bits(whole_state(editor), whole_state(whole))

    def test_a_refused_turn_takes_its_keys_back(self, tokenizer):
        editor = make(tokenizer, **CLOSED)
        editor.edit(FACTS[:TURN])
        before = whole_state(editor)
        editor.on_turn = lambda _turn: fail()
        with pytest.raises(RuntimeError, match="broken"):
            editor.edit(FACTS[TURN:])
        assert_same_bits(whole_state(editor), before)

    def test_one_call_or_several(self, tokenizer):
        whole, parts = make(tokenizer, **CLOSED), make(tokenizer, **CLOSED)
        whole.edit(FACTS)
        for begin in (0, 5, 10):
            parts.edit(FACTS[begin : begin + 5])
        assert_same_bits(whole_state(whole), whole_state(parts))


def sure_model() -> torch.nn.Module:
    """A model that can be sure of an answer: what the others say of their tiny hidden states is always guesswork."""
    model = tiny_model("llama")
    model.get_output_embeddings().weight.data *= 20.0
    return model


class TestRetries:
    def count(self, editor) -> int:
        return editor.normalizers["24 -> 16"].count

    @pytest.mark.parametrize("feeds", [True, False])
    def test_whether_they_feed_the_statistics(self, feeds, monkeypatch, tokenizer):
        editor = make(tokenizer, max_passes=2, retries_feed_statistics=feeds)
        none_takes(monkeypatch)
        once = len(MODULES) * answer_tokens(tokenizer, FACTS[:TURN])
        editor.edit(FACTS[:TURN])
        assert self.count(editor) == (2 * once if feeds else once)
        editor.repair(FACTS[:TURN])
        assert self.count(editor) == (4 * once if feeds else once)

    def test_a_repair_before_anything_else_feeds_them_once(self, tokenizer):
        """There is nothing else to normalise with."""
        editor = make(tokenizer, retries_feed_statistics=False)
        editor.repair(FACTS[:TURN])
        assert self.count(editor) == len(MODULES) * answer_tokens(tokenizer, FACTS[:TURN])

    def test_taken_means_with_the_probability_asked_for(self, tokenizer):
        """As scored by the package's own scores, after the turn."""
        for wanted in (0.0, 0.3):
            how = {"max_passes": 8, "step_size": "auto", "centred": False}
            editor = make(tokenizer, sure_model(), take_probability=wanted, **how)
            (turn,) = editor.edit(FACTS[:TURN]).turns
            scores = answer_scores(editor.model, sequences_of(tokenizer, FACTS[:TURN]), max_tokens=2048)
            assert (
                turn.requests - len(turn.failed)
                == max(turn.taken)
                == int(((scores.accuracy == 1) & (scores.probability >= wanted)).sum())
                > 0
            )

    def test_what_holds_is_not_captured_again(self, monkeypatch, tokenizer):
        """Each capture shows which of its sequences hold; all are looked at only once nothing seems to be left."""
        editor = make(tokenizer, sure_model(), max_passes=20, step_size="auto", centred=False, take_probability=0.9)
        captured, looked = [], []
        real, scores = turns.capture, turns.answer_scores

        def capture(_model, _modules, sequences, **kwargs):
            captured.append(len(sequences))
            return real(_model, _modules, sequences, **kwargs)

        def answer_scores(_model, sequences, **kwargs):
            looked.append(len(sequences))
            return scores(_model, sequences, **kwargs)

        monkeypatch.setattr(turns, "capture", capture)
        monkeypatch.setattr(turns, "answer_scores", answer_scores)
        (turn,) = editor.edit(FACTS[1:4]).turns
        assert captured[:2] == [3, 3] and captured[-1] < 3 and turn.taken[-1] == 3
        assert set(looked) == {3} and len(looked) < len(captured)

    def test_repair_uses_the_trunk_it_is_lent(self, tokenizer):
        editor = make(tokenizer, max_passes=2, edit_modules=MODULES[1:])
        editor.edit(FACTS[:TURN])
        own, trunk = editor.trunk, editor.make_trunk_cache()
        editor.repair(FACTS[:TURN], trunk=trunk)
        assert len(trunk) == TURN  # kept beyond the repair
        assert editor.trunk is own
        other = make(tokenizer, tiny_model("llama"), max_passes=2, edit_modules=MODULES[1:])
        other.edit(FACTS[:TURN])
        other.repair(FACTS[:TURN])
        assert torch.equal(weight_of(editor, MODULES[1]), weight_of(other, MODULES[1]))

    def test_a_lent_trunk_outlives_the_turns(self, tokenizer):
        editor, other = (make(tokenizer, tiny_model("llama"), edit_modules=MODULES[1:]) for _ in range(2))
        trunk = editor.make_trunk_cache()
        editor.edit(FACTS, trunk=trunk)
        other.edit(FACTS)
        assert len(trunk) == len(FACTS) and editor.trunk is None
        assert torch.equal(weight_of(editor, MODULES[1]), weight_of(other, MODULES[1]))

    def test_warm_up_turns_are_solved_once(self, tokenizer):
        editor = make(tokenizer, max_passes=3)
        assert [turn.passes for turn in editor.warm_up(FACTS).turns] == [1, 1, 1]

    def test_the_hook_is_told_what_kind_of_turn_it_was(self, tokenizer):
        editor = make(tokenizer)
        kinds = []
        editor.on_turn = lambda turn: kinds.append(turn.kind)
        editor.warm_up(FACTS[:TURN])
        editor.edit(FACTS[:TURN])
        editor.repair(FACTS[:TURN])
        assert kinds == ["warm_up", "edit", "repair"]
