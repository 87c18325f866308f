"""The locality guard: what it measures, what it keeps, and how the turn loop gives way to it."""

from __future__ import annotations

import math

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors.anchors import unrelated_prompts
from stableedit_cpp.editors.guard import LocalityGuard, Look, guarded_prompts
from stableedit_cpp.model import running
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.tokens import TokenSequence
from support.answers import none_takes
from support.chats import chat_model, chat_tokenizer
from support.editors import MODULES, TURN, assert_same_bits, make, state_of, weight_of
from support.tiny import FACTS, tiny_model

PROMPTS = ["Ice is", "The first month of the year is", "Two", "Cats chase"]
NO_LIMIT = 1e9


def divergence(tokenizer, edited, reference, prompt: str) -> float:
    """Mean of KL(reference || edited) along the reference's own greedy answer of eight tokens, in float64."""
    ids = tokenizer(prompt)["input_ids"]
    found = []
    with torch.inference_mode():
        for _ in range(8):
            q, p = (model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for model in (edited, reference))
            found.append(float((p.exp() * (p - q)).sum()))
            ids = [*ids, int(p.argmax())]
            if ids[-1] == tokenizer.eos_token_id:
                break
    return sum(found) / len(found)


class TestDrift:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_is_the_divergence_from_the_unedited_model(self, architecture, tokenizer):
        pattern = MODULES if architecture == "llama" else None
        editor = make(tokenizer, tiny_model(architecture), edit_modules=pattern)
        guard = LocalityGuard(editor, PROMPTS, limit=NO_LIMIT)
        assert guard.drift().largest < 1e-5
        editor.edit(FACTS)
        expected = [divergence(tokenizer, editor.model, tiny_model(architecture), prompt) for prompt in PROMPTS]
        drift = guard.drift()
        assert drift.per_prompt.tolist() == pytest.approx(expected, rel=2e-2, abs=1e-4)
        assert drift.mean == pytest.approx(sum(expected) / 4, rel=2e-2)
        assert drift.largest == max(drift.per_prompt.tolist())

    def test_without_prompts_it_watches_ours_which_are_no_anchors(self, tokenizer):
        editor = make(tokenizer)
        guard = LocalityGuard(editor, limit=NO_LIMIT)
        assert 10 < len(guard) <= len(guarded_prompts()) == 16
        assert not set(guarded_prompts()) & set(unrelated_prompts())
        assert guard.drift().mean == pytest.approx(0.0, abs=1e-5)
        editor.edit(FACTS)
        assert guard.drift().mean > 0

    def test_it_asks_in_the_form_of_the_editor(self):
        model, tokenizer = chat_model("chatml"), chat_tokenizer("chatml")
        plain, chat = (
            LocalityGuard(se.StableEdit(model, tokenizer, se.StableEditConfig(chat_template=form)), ["Hi"], limit=1.0)
            for form in (False, True)
        )
        assert len(chat._sequences[0]) > len(plain._sequences[0])

    def test_the_reference_is_the_unedited_model_also_later(self, tokenizer):
        early = make(tokenizer)
        guard = LocalityGuard(early, PROMPTS, limit=NO_LIMIT)
        early.edit(FACTS)
        before = state_of(early)
        late = LocalityGuard(early, PROMPTS, limit=NO_LIMIT)
        assert late.drift().per_prompt.tolist() == pytest.approx(guard.drift().per_prompt.tolist(), rel=1e-3)
        assert_same_bits(state_of(early), before)

    def test_trunk_is_kept(self, tokenizer):
        editor = make(tokenizer, edit_modules=MODULES[1:])
        guard = LocalityGuard(editor, PROMPTS, limit=NO_LIMIT)
        calls = []
        editor.model.get_submodule(MODULES[0]).register_forward_hook(lambda *_: calls.append(1))
        guard.drift()
        assert calls == []


def certain() -> torch.nn.Module:
    """A random model that is sure of what it says, and says something else to each prompt."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100.0)
    return model


class TestItsOwnLimit:
    def test_is_two_thirds_of_what_a_prompt_tells_about_its_answer(self, tokenizer):
        guard = LocalityGuard(make(tokenizer, certain()))
        likely = torch.cat([rows.double().log_softmax(-1) for rows in guard._reference])
        told = (likely.exp() * (likely - likely.exp().mean(0).log())).sum(-1).mean()
        assert float(told) > 2.0
        assert guard.limit == pytest.approx(float(told) * 2 / 3, rel=1e-3)

    def test_leaves_room_to_a_model_that_tells_prompts_hardly_apart(self, tokenizer):
        editor = make(tokenizer, step_size=1e2)
        editor.guard = guard = LocalityGuard(editor)
        assert guard.limit == 0.5
        assert sum(turn.back_offs for turn in editor.edit(FACTS).turns) == 0

    def test_one_prompt_counts_with_no_more_than_the_whole(self, tokenizer, monkeypatch):
        guard = LocalityGuard(make(tokenizer, certain()))
        most = len(guard) * 2 // 3
        for count in (1, most, most + 1):
            lost = torch.arange(len(guard)) < count
            measured = torch.where(lost, 1e6, 0.0).double()
            for seed in range(20):
                monkeypatch.setattr(guard, "_measure", lambda indices, *_: torch.zeros(len(indices)).double())
                guard.begin([TokenSequence((seed,), (seed,))])
                monkeypatch.setattr(guard, "_measure", lambda indices, *_, found=measured: found[list(indices)])
                assert guard.look().drift <= guard.limit or count > most
        assert guard.drift().mean > 1e5

    def test_what_ruins_a_model_is_refused(self, tokenizer):
        editor = make(tokenizer, certain(), step_size=1e3)
        editor.guard = LocalityGuard(editor)
        before = state_of(editor)
        with pytest.raises(
            se.DriftLimitReached, match=r"What may help: fewer edits or smaller turns, the automatic step"
        ):
            editor.edit(FACTS)
        assert_same_bits({name: tensor for name, tensor in state_of(editor).items() if name in before}, before)


class TestTheSample:
    def test_of_its_own_prompts_a_few_are_run_while_they_have_not_drifted_far(self, tokenizer, monkeypatch):
        guard, looked = LocalityGuard(make(tokenizer)), []
        drift = torch.zeros(len(guard), dtype=torch.float64)
        monkeypatch.setattr(guard, "_measure", lambda indices, *_: looked.append(set(indices)) or drift[list(indices)])
        one, other = ([TokenSequence((number,), (number,))] for number in (1, 2))
        for edited in (one, other, one):
            guard.begin(edited)
            guard.look()
        assert [len(sample) for sample in looked] == [4] * 6
        assert looked[0] == looked[1] == looked[4] == looked[5] != looked[2] == looked[3]
        drift += 0.51 * guard.limit
        assert guard.look().drift == pytest.approx(0.51 * guard.limit)
        assert [len(sample) for sample in looked[6:]] == [4, len(guard)]

    def test_for_a_turn_of_many_is_run_in_two_halves(self, tokenizer, monkeypatch):
        """Which processes can share, and which come to the same whether or not somebody does."""
        guard, sizes = LocalityGuard(make(tokenizer)), []
        monkeypatch.setattr(running, "answer_logits", lambda *how: sizes.append(len(how[3])) or answer_logits(*how))
        for many, most in ((15, 4), (16, 2)):
            sizes.clear()
            guard.begin([TokenSequence((1,), (1,))] * many)
            assert guard.look().drift == pytest.approx(0.0, abs=1e-5)
            assert sum(sizes) == 2 * 4 and max(sizes) <= most
            assert len(sizes) < 8

    def test_prompts_that_were_given_are_all_run(self, tokenizer, monkeypatch):
        guard, looked = LocalityGuard(make(tokenizer), [*PROMPTS, "Say", "Once"], limit=1.0), []
        monkeypatch.setattr(
            guard, "_measure", lambda indices, *_: looked.append(len(indices)) or torch.zeros(6).double()
        )
        guard.begin([TokenSequence((1,), (1,))])
        guard.look()
        assert looked == [6] and guard.turn_limit == math.inf


class TestATurn:
    @pytest.mark.parametrize("before", [0.0, 0.9])
    def test_may_add_a_quarter_of_the_limit_or_half_a_nat(self, before, tokenizer, monkeypatch):
        guard = LocalityGuard(make(tokenizer, certain()))
        assert guard.turn_limit == max(0.5, guard.limit / 4)
        drift = torch.full((len(guard),), before, dtype=torch.float64)
        monkeypatch.setattr(guard, "_measure", lambda indices, *_: drift[list(indices)])
        guard.begin([TokenSequence((1,), (1,))])
        drift += 0.49
        assert guard.look().within and guard.look().rise == pytest.approx(0.49)
        drift += 0.02
        look = guard.look()
        assert not look.within and look.drift < guard.limit
        assert "0.51 more by this turn alone, beyond the 0.5 that one may add" in str(guard.refusal(look))

    def test_backs_off_for_that(self, tokenizer):
        free, held = (make(tokenizer, certain(), step_size=1e-2) for _ in range(2))
        for one in (free, held):
            one.guard = LocalityGuard(one, back_offs=8)
        free.guard.turn_limit = math.inf
        (turn,) = free.edit(FACTS[:TURN]).turns
        held.guard.turn_limit = 0.5 * turn.drift
        (other,) = held.edit(FACTS[:TURN]).turns
        assert turn.back_offs == 0 < other.back_offs and other.drift <= 0.5 * turn.drift


class TestABrokenModel:
    """Logits that are NaN are no drift of zero: the turn is taken back, and the error says what is wrong."""

    @staticmethod
    def break_answers_of(model: torch.nn.Module, when) -> None:
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda _module, _args, logits: logits * float("nan") if when() else logits)

    def test_has_a_drift_that_is_not_a_number(self, tokenizer):
        editor = make(tokenizer)
        guard = LocalityGuard(editor, PROMPTS, limit=NO_LIMIT)
        self.break_answers_of(editor.model, lambda: True)
        drift = guard.drift()
        assert drift.per_prompt.isnan().all() and drift.mean != drift.mean and drift.largest != drift.largest

    def test_is_refused(self, tokenizer):
        editor = make(tokenizer, edit_modules=MODULES[1:])
        editor.guard = guard = LocalityGuard(editor, PROMPTS, limit=NO_LIMIT, back_offs=1)
        editor.edit(FACTS[:TURN])
        before, weight = state_of(editor), weight_of(editor, MODULES[1])
        kept = weight.clone()
        self.break_answers_of(editor.model, lambda: not torch.equal(weight, kept))
        with pytest.raises(se.ModelBroken, match=r"NaN or infinity to the 4 guarded .* 1 back-offs; .* taken back"):
            editor.edit(FACTS[TURN:])
        assert_same_bits(state_of(editor), before)
        assert guard.drift().mean < 1.0

    def test_is_no_reference(self, tokenizer):
        editor = make(tokenizer)
        self.break_answers_of(editor.model, lambda: True)
        with pytest.raises(se.ModelBroken, match=r"unedited model is broken: .* NaN or infinite for 4 of 4"):
            LocalityGuard(editor, PROMPTS, limit=1.0)


class TestBackingOff:
    def guarded(self, tokenizer, limit: float, **arguments):
        editor = make(tokenizer)
        editor.guard = LocalityGuard(editor, PROMPTS, limit=limit, **arguments)
        return editor

    def full_drift(self, tokenizer) -> float:
        editor = self.guarded(tokenizer, NO_LIMIT)
        return editor.edit(FACTS[:TURN]).turns[0].drift

    def test_without_need_nothing_changes(self, tokenizer):
        guarded, plain = self.guarded(tokenizer, NO_LIMIT), make(tokenizer)
        report = guarded.edit(FACTS)
        plain.edit(FACTS)
        assert_same_bits(state_of(guarded), state_of(plain))
        assert [turn.back_offs for turn in report.turns] == [0, 0, 0]
        assert report.turns[-1].drift == pytest.approx(guarded.guard.drift().mean)
        assert report.turns[0].seconds["guard"] > 0

    def test_smaller_step_and_stronger_ridge_keep_the_limit(self, tokenizer):
        limit = self.full_drift(tokenizer) * 0.5
        editor = self.guarded(tokenizer, limit, back_offs=6)
        (turn,) = editor.edit(FACTS[:TURN]).turns
        assert turn.back_offs > 0 and turn.drift <= limit
        assert editor.guard.drift().mean == pytest.approx(turn.drift)
        # What was applied is what these settings give without a guard.
        factor = 2.0**turn.back_offs
        by_hand = make(tokenizer, step_size=1e-2 / factor, ridge=10.0 * factor)
        by_hand.edit(FACTS[:TURN])
        assert torch.equal(weight_of(editor), weight_of(by_hand))
        assert editor.normalizers["24 -> 16"].count == by_hand.normalizers["24 -> 16"].count

    def test_the_next_turn_begins_with_the_configured_step(self, tokenizer):
        editor = self.guarded(tokenizer, self.full_drift(tokenizer) * 0.5, back_offs=6)
        editor.edit(FACTS[:TURN])
        editor.guard = None
        editor.edit(FACTS[TURN:])
        assert editor.solver.module_editors[MODULES[0]].step_size == editor.config.step_size

    def test_stops_where_backing_off_does_not_help(self, tokenizer):
        editor = self.guarded(tokenizer, NO_LIMIT, back_offs=2)
        editor.edit(FACTS[:TURN])
        before = state_of(editor)
        editor.guard.limit = editor.guard.drift().mean * 1e-3
        with pytest.raises(
            se.DriftLimitReached, match=r"4 guarded prompts .* after 2 back-offs; .* taken back"
        ) as stop:
            editor.edit(FACTS[TURN:])
        assert_same_bits(state_of(editor), before)
        assert stop.value.report.turns == [] and stop.value.drift > editor.guard.limit

    def test_the_report_of_a_stop_has_the_turns_before(self, tokenizer):
        editor = self.guarded(tokenizer, self.full_drift(tokenizer) * 1.0001, back_offs=0)
        with pytest.raises(se.DriftLimitReached) as stop:
            editor.edit(FACTS * 5)
        assert 1 <= len(stop.value.report.turns) < 13
        assert stop.value.report.turns[0].drift <= editor.guard.limit

    def test_a_turn_whose_retry_is_refused_keeps_what_it_has(self, tokenizer, monkeypatch):
        none_takes(monkeypatch)
        editor, by_hand = (make(tokenizer, max_passes=passes, step_size=1.0) for passes in (4, 2))
        editor.guard = guard = LocalityGuard(editor, PROMPTS, limit=NO_LIMIT, back_offs=2)
        seen, real = [], guard.look
        monkeypatch.setattr(guard, "look", lambda: seen.append(1) or (Look(9, 9, False) if len(seen) > 2 else real()))
        (turn,) = editor.edit(FACTS[:TURN]).turns
        assert (turn.passes, turn.back_offs, len(seen)) == (2, 2, 5) and turn.drift == pytest.approx(guard.drift().mean)
        by_hand.edit(FACTS[:TURN])
        assert_same_bits(state_of(editor), state_of(by_hand))

    def test_records_hold_what_was_applied(self, tokenizer):
        editor = self.guarded(tokenizer, self.full_drift(tokenizer) * 0.5, back_offs=6)
        turns = []
        editor.on_turn = turns.append
        before = weight_of(editor).clone()
        editor.edit(FACTS[:TURN])
        update = turns[0].passes[0].updates[MODULES[0]]
        torch.testing.assert_close(weight_of(editor), before + update.dense())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, ["prompts", "at least one"]),
        ({"prompts": ["a", 1]}, ["prompts", "texts"]),
        ({"prompts": ["a", ""]}, ["prompt 1", "no tokens"]),
        ({"prompts": ["a" * 100]}, ["prompt 0", "100 tokens", "64"]),
        ({"limit": 0}, ["limit", "0"]),
        ({"limit": float("nan")}, ["limit", "nan"]),
        ({"back_offs": -1}, ["back_offs", "-1"]),
        ({"back_offs": 1.5}, ["back_offs", "1.5"]),
    ],
)
def test_refusals(arguments, words, tokenizer):
    arguments = {"prompts": PROMPTS, "limit": 1.0} | arguments
    with pytest.raises(ValueError) as error:
        LocalityGuard(make(tokenizer), arguments.pop("prompts"), **arguments)
    assert all(word in str(error.value) for word in words)
