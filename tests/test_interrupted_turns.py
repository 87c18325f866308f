"""A turn is applied whole or not at all, whatever ends it: an error, a broken model, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import MasterWeight
from support.editors import MODULES, TURN, assert_same_bits, make, on_call, state_of, weight_of
from support.tiny import FACTS, tiny_model


def fail() -> None:
    raise RuntimeError("broken")


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

    def test_gradients_are_on_again_after_a_signal_at_a_bad_moment(self, monkeypatch, tokenizer):
        """``torch.no_grad`` has switched them off, and is not entered yet: nothing of torch's switches them on."""

        def enter(context):
            context.prev = torch.is_grad_enabled()
            torch.set_grad_enabled(False)
            raise KeyboardInterrupt

        editor = make(tokenizer)
        with monkeypatch.context() as patch:
            patch.setattr(torch.no_grad, "__enter__", enter)
            with pytest.raises(KeyboardInterrupt):
                editor.edit(FACTS)
        assert torch.is_grad_enabled()

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
