"""The turn loop: all or nothing, interruptible, deterministic, and honest about what it did."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import MasterWeight
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.editors import turn as turns
from stableedit_cpp.evaluation.answers import AnswerScores
from stableedit_cpp.model.tokens import TokenSequence
from support.captures import flags_of, sequences_of
from support.editors import MODULES, TURN, assert_same_bits, make, on_call, state_of, weight_of
from support.tiny import FACTS, tiny_model, tiny_tokenizer


def fail() -> None:
    raise RuntimeError("broken")


class TestTurns:
    def test_last_incomplete_turn_is_edited(self, tokenizer):
        editor = make(tokenizer)
        report = editor.edit(FACTS[:10])
        assert [turn.requests for turn in report.turns] == [5, 5]
        before = weight_of(editor).clone()
        report = editor.edit(FACTS[10:])
        assert [turn.requests for turn in report.turns] == [3]
        assert report.edits == 3
        assert not torch.equal(weight_of(editor), before)

    def test_one_call_or_several(self, tokenizer):
        """The statistics and the masters live on between calls."""
        model = tiny_model("llama", torch.bfloat16)
        whole, parts = make(tokenizer, model), make(tokenizer, tiny_model("llama", torch.bfloat16))
        whole.edit(FACTS)
        for begin in (0, 5, 10):
            parts.edit(iter(FACTS[begin : begin + 5]))
        assert_same_bits(state_of(whole), state_of(parts))

    @pytest.mark.parametrize("count", [0, 1])
    def test_few_requests(self, count, tokenizer):
        editor = make(tokenizer)
        before = state_of(editor)
        report = editor.edit(FACTS[:count])
        assert report.edits == len(report.turns) == count
        assert torch.equal(weight_of(editor), before[f"model {MODULES[0]}.weight"]) == (count == 0)

    def test_single_answer_token(self, tokenizer, monkeypatch):
        """One row in all is its own mean: nothing to learn from yet, and nothing breaks."""
        editor = make(tokenizer, edit_modules=MODULES[:1])
        whole = editor.tokenize
        monkeypatch.setattr(editor, "tokenize", lambda requests: [first_token(one) for one in whole(requests)])
        before = weight_of(editor).clone()
        assert editor.edit(FACTS[:1]).turns[0].answer_tokens == 1
        assert torch.equal(weight_of(editor), before)
        editor.edit(FACTS[1:3])
        assert not torch.equal(weight_of(editor), before)
        assert all(torch.isfinite(tensor).all() for tensor in state_of(editor).values())

    def test_warm_up_stays_in_the_model_and_is_diagonal(self, tokenizer):
        editor = make(tokenizer)
        before = weight_of(editor).clone()
        warm_up = editor.warm_up(FACTS)
        assert [set(turn.whitening.values()) for turn in warm_up.turns] == [{"diagonal"}] * 3
        assert not torch.equal(weight_of(editor), before)
        assert editor.normalizers["24 -> 16"].count == 3 * sum(turn.answer_tokens for turn in warm_up.turns)
        report = editor.edit(FACTS)
        assert [set(turn.whitening.values()) for turn in report.turns] == [{"full"}] * 3

    def test_modes_differ(self, tokenizer):
        results = []
        for whitening in ("full", "diagonal", "none"):
            editor = make(tokenizer, whitening=whitening, warm_up_whitening="none")
            editor.warm_up(FACTS)
            assert {mode for turn in editor.edit(FACTS).turns for mode in turn.whitening.values()} == {whitening}
            results.append(weight_of(editor))
        assert not torch.equal(results[0], results[1])
        assert not torch.equal(results[1], results[2])

    def test_ultraedit(self, tokenizer):
        for exact in (True, False):
            editor = make(tokenizer, editor=se.UltraEdit, config=se.UltraEditConfig, unbiased_batches=not exact)
            before = weight_of(editor).clone()
            reports = editor.warm_up(FACTS[:6]), editor.edit(FACTS)
            assert [report.editor for report in reports] == ["ultraedit"] * 2
            assert {mode for turn in reports[1].turns for mode in turn.whitening.values()} == {"diagonal"}
            assert not torch.equal(weight_of(editor), before)

    def test_model_is_left_as_found(self, tokenizer):
        model = tiny_model("llama").train()
        model.model.layers[1].eval()
        model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
        flags = flags_of(model)
        make(tokenizer, model, max_passes=2).edit(FACTS, progress=True)
        assert flags_of(model) == flags
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_where_gradients_are_switched_off(self, context, tokenizer):
        """Also from one call to the next, inside and outside."""
        inside, outside = make(tokenizer), make(tokenizer)
        with context():
            inside.edit(FACTS[:5])
        inside.edit(FACTS[5:])
        outside.edit(FACTS)
        assert_same_bits(state_of(inside), state_of(outside))


class TestAllOrNothing:
    """A failure in the second turn: the first stays, nothing of the second is applied."""

    def after_first_turn(self, tokenizer, **changes) -> dict[str, torch.Tensor]:
        editor = make(tokenizer, **changes)
        editor.edit(FACTS[:TURN])
        return state_of(editor)

    def test_capture_fails(self, monkeypatch, tokenizer):
        on_call(monkeypatch, 2, fail)
        editor = make(tokenizer)
        with pytest.raises(RuntimeError, match="broken"):
            editor.edit(FACTS)
        assert_same_bits(state_of(editor), self.after_first_turn(tokenizer))

    def test_mathematics_fails_at_the_second_module(self, tokenizer):
        """The statistics of the turn are folded in by then, and must go back."""
        editor = make(tokenizer)
        editor.edit(FACTS[:TURN])

        class Broken:
            def compute_update(self, *_):
                raise torch.linalg.LinAlgError("broken")

        working = editor.solver.module_editors[MODULES[1]]
        editor.solver.module_editors[MODULES[1]] = Broken()
        with pytest.raises(torch.linalg.LinAlgError, match="broken"):
            editor.edit(FACTS[TURN:])
        assert_same_bits(state_of(editor), self.after_first_turn(tokenizer))

        # And the stream can go on as if nothing had happened.
        editor.solver.module_editors[MODULES[1]] = working
        editor.edit(FACTS[TURN:])
        whole = make(tokenizer)
        whole.edit(FACTS)
        assert_same_bits(state_of(editor), state_of(whole))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_check_fails_at_the_second_module(self, dtype, monkeypatch, tokenizer):
        editor = make(tokenizer, tiny_model("llama", dtype))
        editor.edit(FACTS[:TURN])
        before = state_of(editor)
        real, calls = MasterWeight.check, []

        def check(self, update):
            calls.append(1)
            if len(calls) == 2:
                fail()
            real(self, update)

        monkeypatch.setattr(MasterWeight, "check", check)
        with pytest.raises(RuntimeError, match="broken"):
            editor.edit(FACTS[TURN:])
        assert len(calls) == 2
        assert_same_bits(state_of(editor), before)

    def test_update_beyond_the_range_of_float16(self, tokenizer):
        """Refused, not turned into infinite weights."""
        editor = make(tokenizer, tiny_model("llama", torch.float16), step_size=1e8)
        before = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
        with pytest.raises(torch.linalg.LinAlgError, match="use a smaller step_size"):
            editor.edit(FACTS)
        assert all(torch.equal(tensor, before[name]) for name, tensor in editor.model.state_dict().items())
        assert editor.normalizers["24 -> 16"].count == 0

    def test_nan_names_the_request(self, tokenizer):
        """The letter Z, which only request 7 has, has a NaN embedding; the turn before stays."""
        editor = make(tokenizer)
        (letter,) = tokenizer("Z")["input_ids"]
        editor.model.model.embed_tokens.weight.data[letter] = float("nan")
        facts = [fact | {"id": f"fact-{index}"} for index, fact in enumerate(FACTS)]
        editor.edit(facts[:TURN])
        before = state_of(editor)
        facts[7]["prompt"] = "Z is"
        with pytest.raises(ValueError, match=r"^request 2 \(fact-7\): the loss is NaN or infinite; the turn was not"):
            editor.edit(facts[TURN:])
        after = state_of(editor)
        embedding = "model model.embed_tokens.weight"
        assert torch.equal(before.pop(embedding).isnan(), after.pop(embedding).isnan())
        assert_same_bits(after, before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_failing_second_pass_takes_the_first_back(self, dtype, monkeypatch, tokenizer):
        editor = make(tokenizer, tiny_model("llama", dtype), max_passes=3)
        editor.edit(FACTS[:TURN])
        before = state_of(editor)
        seen = []
        on_call(monkeypatch, 2, lambda: seen.append(weight_of(editor).clone()) or fail())
        with pytest.raises(RuntimeError, match="broken"):
            editor.edit(FACTS[TURN:])
        assert not torch.equal(seen[0], before[f"model {MODULES[0]}.weight"])  # the first pass had been applied
        assert_same_bits(state_of(editor), before)


def outcomes_are(monkeypatch, editor, accuracy, likely=None) -> list[list]:
    """Captures and looks show these shares of right answer tokens, by request, and these least likely ones: the first
    of the unedited model, then one for each weights that were not there before. Returns what captures were asked for.
    """
    states, captured, real = [], [], turns.capture
    sequences = editor.tokenize(as_requests(FACTS[:5]))

    def now() -> tuple[torch.Tensor, torch.Tensor]:
        weight = editor.modules[0].weight.detach().clone()
        number = next((n for n, known in enumerate(states) if torch.equal(known, weight)), len(states))
        states.extend([weight] if number == len(states) else [])
        probability = 1.0 if likely is None else likely[number]
        return torch.tensor(accuracy[number], dtype=torch.float64), torch.full((5,), probability, dtype=torch.float64)

    def capture(model, modules, asked, **how):
        captured.append(list(asked))
        shown, probability = now()
        these = [sequences.index(sequence) for sequence in asked]
        found = real(model, modules, asked, **how)
        return dataclasses.replace(found, correct=shown[these], probability=probability[these])

    monkeypatch.setattr(turns, "capture", capture)
    monkeypatch.setattr(turns, "answer_scores", lambda *_args, **_how: AnswerScores(*now()))
    return captured


class TestPasses:
    def test_only_what_has_not_taken_is_solved_again(self, monkeypatch, tokenizer):
        """Requests 1 and 3 of the turn hold after the first pass, as the capture for the second shows, all of them
        after the second."""
        editor = make(tokenizer, max_passes=5)
        captured = outcomes_are(monkeypatch, editor, [[0.0] * 5, [0.5, 1.0, 0.0, 1.0, 0.9], [1.0] * 5])
        report = editor.edit(FACTS[:5])
        all_five = sequences_of(tokenizer, FACTS[:5])
        assert captured == [all_five, all_five, [all_five[0], all_five[2], all_five[4]]]
        assert (report.turns[0].passes, report.turns[0].taken) == (2, [2, 5])
        assert report.turns[0].answer_tokens == sum(len(sequence.answer) for sequence in all_five)

    def test_a_turn_ends_at_its_best_pass(self, monkeypatch, tokenizer):
        """Three of five hold after the second pass, fewer after those that follow: they are not in the model, nor in
        what a follower hears of. That two were undone by the third shows only in the last look."""
        heard, norms = [], []
        editor, short = make(tokenizer, max_passes=4), make(tokenizer, max_passes=2)
        editor.on_turn = heard.append
        for one in (editor, short):
            accuracy = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
            outcomes_are(monkeypatch, one, accuracy)
            report = one.edit(FACTS[:5])
            (turn,) = report.turns
            assert turn.passes == 2 and [failure.index for failure in turn.failed] == [3, 4]
            assert turn.taken == ([1, 3, 3, 1] if one is editor else [1, 3])
            norms.append(turn.update_norms)
        assert norms[0] == norms[1]  # those of the pass that is in the weights
        assert_same_bits(state_of(editor), state_of(short))
        again = make(tokenizer, max_passes=4)
        again.replay(heard[0])
        assert_same_bits(state_of(again), state_of(editor))

    def test_of_two_passes_with_which_as_many_take_the_likelier_answers_stay(self, monkeypatch, tokenizer):
        editor = make(tokenizer, max_passes=3)
        outcomes_are(monkeypatch, editor, [[0.0] * 5] * 4, [0.1, 0.2, 0.3, 0.1])
        assert editor.edit(FACTS[:5]).turns[0].passes == 2

    def test_one_pass(self, tokenizer):
        assert [turn.passes for turn in make(tokenizer).edit(FACTS).turns] == [1, 1, 1]


@pytest.mark.usefixtures("default_sigint")
class TestInterrupt:
    def first_turns(self, tokenizer, count: int) -> dict[str, torch.Tensor]:
        editor = make(tokenizer)
        editor.edit(FACTS[:count])
        return state_of(editor)

    def test_ctrl_c_finishes_the_turn(self, monkeypatch, tokenizer):
        on_call(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        editor = make(tokenizer)
        with pytest.raises(se.EditInterrupted, match=r"turn 2 of 3, which was finished and applied: 10 of 13") as error:
            editor.edit(FACTS)
        assert isinstance(error.value, KeyboardInterrupt)
        assert error.value.report.edits == 10
        assert [turn.requests for turn in error.value.report.turns] == [5, 5]
        assert error.value.report.seconds > 0
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_same_bits(state_of(editor), self.first_turns(tokenizer, 10))

    def test_second_ctrl_c_drops_the_turn(self, monkeypatch, tokenizer):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        on_call(monkeypatch, 2, twice)
        editor = make(tokenizer)
        with pytest.raises(KeyboardInterrupt, match="the turn in flight was dropped") as error:
            editor.edit(FACTS)
        assert not isinstance(error.value, se.EditInterrupted)
        assert_same_bits(state_of(editor), self.first_turns(tokenizer, 5))
        editor.edit(FACTS[5:])  # and on it goes
        assert_same_bits(state_of(editor), self.first_turns(tokenizer, 13))

    def test_second_ctrl_c_does_not_cut_the_commit_in_half(self, monkeypatch, tokenizer):
        """While the weights are being written: all modules get their update, then it stops."""
        real, calls = MasterWeight.apply, []

        def apply(self, update):
            calls.append(1)
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
            real(self, update)

        editor = make(tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(MasterWeight, "apply", apply)
            with pytest.raises(se.EditInterrupted, match="turn 1 of 3"):
                editor.edit(FACTS)
        assert len(calls) == len(MODULES)
        assert_same_bits(state_of(editor), self.first_turns(tokenizer, 5))

    def test_second_ctrl_c_just_after_the_commit(self, monkeypatch, tokenizer):
        """The weights are written, so the turn stands: statistics and weights belong together."""
        editor = make(tokenizer)

        def accept(_step_size, _ridge):  # called right after
            assert weight_of(editor).ne(tiny_model("llama").get_submodule(MODULES[0]).weight).any()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(editor.solver, "accept", accept)
            with pytest.raises(se.EditInterrupted, match="turn 1 of 3"):
                editor.edit(FACTS)
        assert_same_bits(state_of(editor), self.first_turns(tokenizer, 5))

    def test_second_ctrl_c_between_two_passes_drops_both(self, monkeypatch, tokenizer):
        editor = make(tokenizer, max_passes=3)
        editor.edit(FACTS[:5])
        before = state_of(editor)

        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        on_call(monkeypatch, 2, twice)  # the capture for the second pass
        with pytest.raises(KeyboardInterrupt) as error:
            editor.edit(FACTS[5:10])
        assert not isinstance(error.value, se.EditInterrupted)
        assert_same_bits(state_of(editor), before)

    def test_ctrl_c_in_the_last_turn(self, monkeypatch, tokenizer):
        """It is not swallowed: the caller may have more to do after this stream."""
        on_call(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(se.EditInterrupted, match=r"turn 3 of 3, .* 13 of 13") as error:
            make(tokenizer).edit(FACTS)
        assert error.value.report.edits == 13

    def test_handler_is_restored_after_an_error(self, monkeypatch, tokenizer):
        on_call(monkeypatch, 1, fail)
        with pytest.raises(RuntimeError):
            make(tokenizer).edit(FACTS)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_the_applications_own_handler_is_respected(self, monkeypatch, tokenizer):
        received = []
        on_call(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        signal.signal(signal.SIGINT, lambda *_: received.append(1))
        try:
            assert make(tokenizer).edit(FACTS).edits == 13
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        assert received == [1]

    def test_outside_the_main_thread(self, tokenizer):
        reports = []
        thread = threading.Thread(target=lambda: reports.append(make(tokenizer).edit(FACTS)))
        thread.start()
        thread.join()
        assert reports[0].edits == 13


class TestStatistics:
    def test_pooled_by_shape_or_apart(self, tokenizer):
        mixed = [*MODULES, "model.layers.2.mlp.up_proj"]
        shared = make(tokenizer, edit_modules=mixed)
        apart = make(tokenizer, edit_modules=mixed, statistics="per_module")
        assert list(shared.normalizers) == ["24 -> 16", "16 -> 24"]
        assert set(apart.normalizers) == set(mixed)
        tokens = sum(turn.answer_tokens for turn in shared.edit(FACTS).turns)
        apart.edit(FACTS)
        assert shared.normalizers["24 -> 16"].count == 3 * tokens
        assert shared.normalizers["16 -> 24"].count == tokens
        assert all(normalizer.count == tokens for normalizer in apart.normalizers.values())
        assert not torch.allclose(weight_of(shared), weight_of(apart))

    def test_one_module_is_the_same_either_way(self, tokenizer):
        shared, apart = (
            make(tokenizer, edit_modules=MODULES[:1], statistics=statistics) for statistics in ("shared", "per_module")
        )
        shared.edit(FACTS)
        apart.edit(FACTS)
        assert torch.equal(weight_of(shared), weight_of(apart))

    def test_the_turn_is_folded_in_before_it_is_normalised(self, tokenizer):
        """Otherwise the first turn would meet empty statistics."""
        editor = make(tokenizer)
        report = editor.edit(FACTS[:TURN])
        normalizer = editor.normalizers["24 -> 16"]
        assert normalizer.count == 3 * report.turns[0].answer_tokens > 17
        assert report.turns[0].whitening == {"24 -> 16": "full"}


class TestSameInputSameBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_two_runs(self, dtype, tokenizer):
        states = []
        for _ in range(2):
            editor = make(tokenizer, tiny_model("llama", dtype), max_passes=2)
            editor.warm_up(FACTS)
            editor.edit(FACTS)
            states.append(state_of(editor))
        assert_same_bits(*states)

    def test_forms_of_requests(self, tokenizer):
        """Dicts, EditRequests, records of a published data set."""
        zsre = [{"src": fact["prompt"], "ans": fact["target"]} for fact in FACTS]
        states = []
        for requests in (FACTS, [se.EditRequest(**fact) for fact in FACTS], zsre, [*zsre[:3], *FACTS[3:]]):
            editor = make(tokenizer)
            editor.edit(requests)
            states.append(state_of(editor))
        for state in states[1:]:
            assert_same_bits(states[0], state)

    def test_bar_train_mode_and_size_of_the_forward_pass_change_nothing(self, tokenizer):
        plain, other = make(tokenizer), make(tokenizer, tiny_model("llama").train())
        plain.edit(FACTS, progress=False)
        other.edit(FACTS, progress=True)
        assert_same_bits(state_of(plain), state_of(other))
        small = make(tokenizer, max_tokens_per_forward=60)
        small.edit(FACTS)
        assert torch.allclose(weight_of(small), weight_of(plain), rtol=1e-4, atol=1e-5)


BAD_REQUESTS = {
    "empty target": ({"prompt": "x", "target": ""}, "request 12: target is empty"),
    "blank target": ({"prompt": "x", "target": "  "}, "request 12: target is empty"),
    "empty prompt": ({"prompt": "", "target": "x"}, "request 12: prompt is empty"),
    "no target": ({"prompt": "x"}, "request 12: the record lacks a prompt or a target field; its fields are: prompt"),
    "target is no text": ({"prompt": "x", "target": True}, "request 12: target must be text, not bool"),
    "too long": (
        {"prompt": "p" * 60, "target": "t" * 10, "id": "long"},
        r"request 12 \(long\): prompt and target have 70 tokens, more than the model's context of 64",
    ),
    "same id": ({"prompt": "x", "target": "y", "id": "first"}, "requests 0 and 12 have the same id 'first'"),
    "not a record": (("x", "y"), "request 12 must be an EditRequest or a dict, not tuple"),
    "nothing": (None, "request 12 must be an EditRequest or a dict, not NoneType"),
}


class TestBadRequests:
    @pytest.mark.parametrize("bad, message", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
    @pytest.mark.parametrize("call", ["edit", "warm_up"])
    def test_refused_before_the_first_turn(self, call, bad, message, tokenizer):
        """The last of 13 requests is wrong: not one turn is edited."""
        editor = make(tokenizer)
        editor.edit(FACTS[:2])
        before = state_of(editor)
        requests = [FACTS[0] | {"id": "first"}, *FACTS[1:12], bad]
        with pytest.raises(ValueError, match=message):
            getattr(editor, call)(requests)
        assert_same_bits(state_of(editor), before)

    @pytest.mark.parametrize("requests", [FACTS[0], se.EditRequest("x", "y"), "x"], ids=["dict", "request", "text"])
    def test_a_single_request_instead_of_a_list(self, requests, tokenizer):
        with pytest.raises(ValueError, match="requests must be a list of EditRequest or dict, not a single"):
            make(tokenizer).edit(requests)


class TestWeightsBetweenCalls:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("how", ["in place", "new data", "new parameter"])
    def test_changed_by_the_caller(self, how, dtype, tokenizer):
        """What the caller puts there is edited, not an old master."""
        editor = make(tokenizer, tiny_model("llama", dtype))
        editor.edit(FACTS[:5])
        module = editor.model.get_submodule(MODULES[0])
        if how == "in place":
            module.weight.data.zero_()
        elif how == "new data":
            module.weight.data = torch.zeros_like(module.weight)
        else:
            module.weight = torch.nn.Parameter(torch.zeros_like(module.weight))
        turn = editor.edit(FACTS[5:10]).turns[0]
        assert weight_of(editor).float().norm().item() == pytest.approx(turn.update_norms[MODULES[0]], rel=0.01)

    def test_another_dtype(self, tokenizer):
        editor = make(tokenizer, tiny_model("llama", torch.bfloat16))
        editor.edit(FACTS[:5])
        editor.model.float()
        before = weight_of(editor).clone()
        turn = editor.edit(FACTS[5:10]).turns[0]
        assert weight_of(editor).dtype == torch.float32
        change = (weight_of(editor) - before).norm().item()
        assert change == pytest.approx(turn.update_norms[MODULES[0]], rel=1e-4)

    def test_small_updates_add_up_in_bfloat16(self, tokenizer):
        """Steps that a bf16 weight would swallow reach the master: the sum is that of a float32 model."""
        half = make(tokenizer, tiny_model("llama", torch.bfloat16), step_size=1e-5)
        full = make(tokenizer, tiny_model("llama", torch.bfloat16).float(), step_size=1e-5)
        start = weight_of(full).clone()
        for editor in (half, full):
            for _ in range(10):
                editor.edit(FACTS)
        expected = weight_of(full) - start
        moved = half.weights[MODULES[0]].master - start
        assert (moved - expected).norm() < 0.1 * expected.norm()
        assert expected.abs().max() < 0.01 * start.abs().mean()


class TestReport:
    def test_consistent(self, tokenizer):
        editor = make(tokenizer, max_tokens_per_forward=100)
        before = weight_of(editor).clone()
        report = editor.edit(FACTS)
        assert report.editor == "stableedit"
        assert report.edits == len(FACTS)
        tokens = [len(sequence.answer) for sequence in sequences_of(tokenizer)]
        assert [turn.answer_tokens for turn in report.turns] == [sum(tokens[:5]), sum(tokens[5:10]), sum(tokens[10:])]
        parts = report.seconds_by_part()
        assert set(parts) == {"capture", "mathematics", "apply"}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= report.seconds
        assert report.edits_per_second == pytest.approx(report.edits / report.seconds)
        for turn in report.turns:
            assert 4 < turn.loss_before < 8
            assert 0 <= turn.efficacy_before <= 1
            assert turn.efficacy_after is None
            assert list(turn.update_norms) == MODULES
        assert (weight_of(editor) - before).norm() <= sum(turn.update_norms[MODULES[0]] for turn in report.turns) * 1.01

    def test_update_norm_is_that_of_the_weight_change(self, tokenizer):
        editor = make(tokenizer)
        before = {name: weight_of(editor, name).clone() for name in MODULES}
        (turn,) = editor.edit(FACTS[:5]).turns
        for name, norm in turn.update_norms.items():
            assert (weight_of(editor, name) - before[name]).norm().item() == pytest.approx(norm, rel=1e-4)

    def test_json(self, tokenizer):
        report = make(tokenizer).edit(FACTS)
        document = json.loads(json.dumps(report.to_dict()))
        assert document["edits"] == 13
        assert document["turns"][2]["requests"] == 3
        assert document["turns"][0]["whitening"] == {"24 -> 16": "full"}
        assert document["seconds_by_part"].keys() == {"capture", "mathematics", "apply"}

    def test_progress_bar(self, capfd, tokenizer):
        editor = make(tokenizer)
        editor.warm_up(FACTS[:5], progress=True)
        report = editor.edit(FACTS, progress=True)
        shown = capfd.readouterr().err
        assert "Warm-up: 100%" in shown and "5/5" in shown
        assert "Editing: 100%" in shown and "13/13" in shown
        assert "edit/s" in shown
        assert "efficacy=0." in shown
        expected = se.evaluate(editor.model, tokenizer, FACTS[10:]).efficacy
        assert report.turns[-1].efficacy_after == pytest.approx(expected)

    @pytest.mark.parametrize("progress", [False, None])
    def test_no_bar(self, progress, capfd, tokenizer):
        """None shows it on a terminal only."""
        make(tokenizer).edit(FACTS, progress=progress)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("settings", [{"bos": True}, {"eos": True}, {"padding_side": "left"}], ids=str)
def test_any_tokenizer(settings):
    """Edits take with every kind of tokenizer."""
    editor = make(tiny_tokenizer(**settings), max_passes=8)
    before = se.evaluate(editor.model, editor.tokenizer, FACTS).efficacy
    assert editor.edit(FACTS).edits == 13
    assert se.evaluate(editor.model, editor.tokenizer, FACTS).efficacy > before + 0.05


def test_default_config(tokenizer):
    """Without a config the editors choose the modules themselves."""
    for editor_class, name in (
        (se.StableEdit, "transformer.h.2.attn.c_proj"),
        (se.UltraEdit, "transformer.h.2.mlp.c_proj"),
    ):
        model = tiny_model("gpt2")
        before = model.get_submodule(name).weight.detach().clone()
        editor = editor_class(model, tokenizer)
        assert [module.name for module in editor.modules] == [name]
        editor.edit(FACTS)
        assert not torch.equal(model.get_submodule(name).weight, before)


def first_token(sequence: TokenSequence) -> TokenSequence:
    """A prompt with the first token of its answer."""
    return TokenSequence(sequence.ids[: len(sequence.ids) - len(sequence.answer) + 1], sequence.answer[:1])
