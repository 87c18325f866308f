"""Every change of the weights and statistics happens as a whole or not at all, wherever and however it fails."""

from __future__ import annotations

import signal
import time

import pytest
import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.guard import LocalityGuard
from stableedit_cpp.editors.interrupt import undisturbed
from support.answers import none_takes
from support.editors import MODULES, assert_same_bits, make
from support.faults import Alarm, alarms, everything, fails_without_a_trace, instants
from support.tiny import FACTS, tiny_model

CLOSED = {"max_passes": 3, "past_key_weight": 0.05, "turn_size": 2}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def editor(request, tokenizer):
    """One that has edited, in one pass a turn."""
    editor = make(tokenizer, tiny_model("llama", request.param), turn_size=2)
    editor.edit(FACTS[:2])
    return editor


def updates_of(editor) -> dict[str, LowRankUpdate]:
    return {
        module.name: LowRankUpdate(torch.randn(module.shape[1], 2) * 0.1, torch.randn(2, module.shape[0]))
        for module in editor.modules
    }


class TestFailuresAtEveryStep:
    @pytest.mark.parametrize("call", ["edit", "warm_up", "repair"])
    def test_a_turn(self, call, editor, monkeypatch):
        """With one pass and nobody who listens, too."""
        found = fails_without_a_trace(editor, lambda: getattr(editor, call)(FACTS[2:4]), monkeypatch)
        assert found > 2 * 4 * len(MODULES)

    def test_a_turn_of_several_passes(self, tokenizer, monkeypatch):
        none_takes(monkeypatch)
        editor = make(tokenizer, **CLOSED)
        editor.edit(FACTS[:2])
        fails_without_a_trace(editor, lambda: editor.edit(FACTS[2:4]), monkeypatch)

    def test_a_guarded_turn_that_backs_off(self, tokenizer, monkeypatch):
        editor = make(tokenizer, turn_size=2)
        editor.guard = guard = LocalityGuard(editor, ["Say", "Once"], limit=1.0, back_offs=20)
        editor.edit(FACTS[:2])
        guard.limit = 1.02 * guard.drift().mean
        back_offs = []
        action = lambda: back_offs.append(editor.edit(FACTS[2:4]).turns[0].back_offs)  # noqa: E731
        fails_without_a_trace(editor, action, monkeypatch)
        assert back_offs[0] > 1

    def test_added_updates(self, editor, monkeypatch):
        updates = updates_of(editor)
        fails_without_a_trace(editor, lambda: editor.weights.add(updates), monkeypatch)

    def test_shrinking(self, editor, monkeypatch):
        fails_without_a_trace(editor, lambda: editor.shrink(0.5), monkeypatch)

    def test_a_turn_that_is_done_again(self, editor, monkeypatch):
        seen = []
        editor.on_turn = seen.append
        editor.edit(FACTS[2:4])
        editor.on_turn = None
        fails_without_a_trace(editor, lambda: editor.replay(seen[0]), monkeypatch)

    def test_going_back(self, editor, monkeypatch):
        here = editor.checkpoint()
        editor.edit(FACTS[2:4])
        fails_without_a_trace(editor, here.restore, monkeypatch)


@pytest.mark.parametrize("broken", ["weights", "normalizer", "past_keys"])
def test_a_state_that_cannot_be_loaded_to_the_end(broken, tokenizer):
    source, editor = (make(tokenizer, tiny_model("llama"), **CLOSED) for _ in range(2))
    source.edit(FACTS)
    editor.edit(FACTS[:2])
    before, state = everything(editor), {part: dict(fields) for part, fields in source.state_dict().items()}
    part = [name for name in state if name.startswith(broken)][-1]
    field = list(state[part])[-1]
    state[part][field] = "no tensor"
    with pytest.raises((TypeError, ValueError, AttributeError)):
        editor.load_state_dict(state)
    assert_same_bits(everything(editor), before)
    editor.load_state_dict(source.state_dict())
    assert_same_bits(everything(editor), everything(source))


def test_original_weights_are_kept_all_or_none(editor, monkeypatch):
    originals, real, calls = editor.original_weights(), torch.Tensor.to, []

    def to(self, *args, **how):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        with pytest.raises(MemoryError):
            editor.keep_original_weights()
    assert_same_bits(editor.original_weights(), originals)


def test_nothing_else_changes_while_a_turn_is_under_way(tokenizer):
    """A listener may look, but what it changes would be in the turn and in no record of it."""
    editor = make(tokenizer, turn_size=2)
    editor.edit(FACTS[:2])
    before = everything(editor)
    for meddle in (
        lambda _turn: editor.weights.add(updates_of(editor)),
        lambda _turn: editor.load_state_dict(editor.state_dict()),
        lambda _turn: editor.edit(FACTS[4:6]),
    ):
        editor.on_turn = meddle
        with pytest.raises(ValueError, match="has to wait until the turn that is under way is final"):
            editor.edit(FACTS[2:4])
        assert_same_bits(everything(editor), before)
    with pytest.raises(RuntimeError, match="only within"):
        editor.weights.apply(updates_of(editor))


def duration(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal came within a __del__
class TestSignalsThatRaise:
    """An application that handles a signal itself, and raises, wherever the program is."""

    COUNT = 40

    def test_a_turn(self, tokenizer, monkeypatch):
        none_takes(monkeypatch)
        editor = make(tokenizer, **CLOSED)
        editor.edit(FACTS[:2])
        before, here = everything(editor), editor.checkpoint()
        seconds = duration(lambda: editor.edit(FACTS[2:4]))
        after, interrupted = everything(editor), 0
        here.restore()
        with alarms() as alarm:
            for instant in instants(seconds, self.COUNT):
                try:
                    alarm(instant)
                    editor.edit(FACTS[2:4])
                    alarm(0)
                except Alarm:
                    interrupted += 1
                found = everything(editor)
                final = torch.equal(found[f"weights {MODULES[0]}"], after[f"weights {MODULES[0]}"])
                assert_same_bits(found, after if final else before)
                here.restore()
        assert interrupted > 0
        editor.edit(FACTS[2:4])
        assert_same_bits(everything(editor), after)

    def test_showing_the_original_weights(self, editor):
        before = everything(editor)

        def look() -> None:
            with editor.unedited():
                pass

        seconds = duration(look)
        with alarms() as alarm:
            for instant in instants(2 * seconds, 10 * self.COUNT):
                try:
                    alarm(instant)
                    look()
                    alarm(0)
                except Alarm:
                    pass
                assert_same_bits(everything(editor), before)

    def test_they_wait_for_what_is_written_as_a_whole(self):
        seen = []
        with alarms():
            with pytest.raises(Alarm), undisturbed():
                signal.raise_signal(signal.SIGALRM)
                seen.append("to the end")
            handler = signal.getsignal(signal.SIGALRM)
            with undisturbed(), undisturbed():
                pass
            assert signal.getsignal(signal.SIGALRM) is handler
        assert seen == ["to the end"]
