"""Who follows an editor hears of every change of its weights, and may refuse it; one that is not told sees it."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors import Follower
from support.editors import MODULES, TURN, assert_same_bits, make, weight_of
from support.faults import everything
from support.tiny import FACTS, tiny_model


class Listener(Follower):
    """Writes down what it hears, and raises where it is told to."""

    def __init__(self, *refuses: str, heard: list | None = None) -> None:
        self.refuses = refuses
        self.heard = [] if heard is None else heard

    def _hear(self, what: str) -> None:
        self.heard.append(what)
        if what.split(":")[0] in self.refuses:
            raise ValueError(f"refused at {what}")

    def begin(self) -> None:
        self._hear("begin")

    def applied(self, turn) -> None:
        self._hear(f"applied: {turn.kind} {len(turn.requests)}")

    def record(self, turn) -> None:
        self._hear(f"record: {turn.kind} {len(turn.requests)}")

    def final(self, turn) -> None:
        self._hear(f"final: {turn.kind} {len(turn.requests)}")

    def before(self, change: str) -> None:
        self._hear(f"before: {change}")

    def after(self, change: str) -> None:
        self._hear(f"after: {change}")


def follow(editor, *refuses: str) -> Listener:
    listener = Listener(*refuses)
    editor.followers.add(listener)
    return listener


def updates_of(editor) -> dict[str, LowRankUpdate]:
    return {
        module.name: LowRankUpdate(torch.ones(module.shape[1], 1), torch.ones(1, module.shape[0]))
        for module in editor.modules
    }


def change_behind_its_back(editor, how: str = "in place") -> None:
    module = editor.model.get_submodule(MODULES[1])
    if how == "in place":
        module.weight.data[0, 0] += 1.0
    elif how == "new data":
        module.weight.data = torch.zeros_like(module.weight)
    else:
        module.weight = torch.nn.Parameter(torch.zeros_like(module.weight))


# What changes the weights besides turns, by what followers are told.
CHANGES = {
    "adding updates": lambda editor: editor.weights.add(updates_of(editor)),
    "shrinking what was added": lambda editor: editor.shrink(0.5),
    "loading a state": lambda editor: editor.load_state_dict(editor.state_dict()),
    "going back to a checkpoint": lambda editor: editor.checkpoint().restore(),
    f"a change of {MODULES[1]} that went past the editor": lambda editor: (
        change_behind_its_back(editor),
        editor.weight_changes(),
    ),
}


@pytest.fixture
def editor(tokenizer):
    editor = make(tokenizer)
    editor.edit(FACTS[:TURN])
    return editor


class TestTurns:
    @pytest.mark.parametrize("call", ["edit", "warm_up", "repair"])
    def test_are_heard_in_order(self, call, editor):
        listener = follow(editor)
        editor.on_turn = lambda turn: listener.heard.append("on_turn")
        getattr(editor, call)(FACTS[: TURN + 2])
        one = lambda size: [  # noqa: E731
            "begin",
            "on_turn",
            *(f"{step}: {call} {size}" for step in ("applied", "record", "final")),
        ]
        assert listener.heard == one(TURN) + one(2)

    @pytest.mark.parametrize("step", ["begin", "applied", "record"])
    def test_may_be_refused_until_they_are_final(self, step, editor):
        listeners = [follow(editor), follow(editor, step), follow(editor)]
        before = everything(editor)
        with pytest.raises(ValueError, match=f"refused at {step}"):
            editor.edit(FACTS[TURN:])
        assert_same_bits(everything(editor), before)
        assert not any(what.startswith("final") for listener in listeners for what in listener.heard)
        editor.followers.remove(listeners[1])
        editor.edit(FACTS[TURN:])
        assert sum(what.startswith("final") for what in listeners[2].heard) == 2

    def test_stay_when_a_follower_fails_that_hears_they_are_final(self, tokenizer):
        editor, other = make(tokenizer), make(tokenizer)
        listeners = [follow(editor, "final"), follow(editor)]
        with pytest.raises(ValueError, match="refused at final") as error:
            editor.edit(FACTS)
        other.edit(FACTS[:TURN])
        assert_same_bits(everything(editor), everything(other))
        assert listeners[1].heard[-1] == f"final: edit {TURN}"
        assert error.value.report.edits == TURN
        editor.followers.remove(listeners[0])
        editor.edit(FACTS[TURN:])
        other.edit(FACTS[TURN:])
        assert_same_bits(everything(editor), everything(other))

    def test_are_kept_only_for_who_listens(self, editor):
        seen = []
        editor.on_turn = lambda turn: seen.append(len(turn.passes))
        editor.edit(FACTS[:2])
        assert seen == [1] and not editor.followers.muted


class TestOtherChanges:
    @pytest.mark.parametrize("change", CHANGES)
    def test_are_heard(self, change, editor):
        listener, revision = follow(editor), editor.weights.revision
        CHANGES[change](editor)
        assert listener.heard == [f"before: {change}", f"after: {change}"]
        assert editor.weights.revision == revision + 1

    @pytest.mark.parametrize("change", [name for name in CHANGES if "past the editor" not in name])
    def test_may_be_refused(self, change, editor):
        listeners = [follow(editor), follow(editor, "before")]
        before = everything(editor)
        with pytest.raises(ValueError, match=f"refused at before: {change}"):
            CHANGES[change](editor)
        assert_same_bits(everything(editor), before)
        assert listeners[0].heard == [f"before: {change}"]

    @pytest.mark.parametrize("change", CHANGES)
    def test_stand_when_a_follower_fails_that_hears_of_them(self, change, tokenizer):
        editors = [make(tokenizer) for _ in range(2)]
        for editor in editors:
            editor.edit(FACTS[:TURN])
        listeners = [follow(editors[0], "after"), follow(editors[0])]
        with pytest.raises(ValueError, match="refused at after"):
            CHANGES[change](editors[0])
        assert listeners[1].heard[-1] == f"after: {change}"
        CHANGES[change](editors[1])
        assert_same_bits(everything(editors[0]), everything(editors[1]))

    def test_who_makes_a_change_is_not_asked(self, editor):
        listeners = [follow(editor, "before", "after"), follow(editor)]
        add = lambda _: editor.weights.add(updates_of(editor))  # noqa: E731
        editor.weights.change(add, "a change of its own", by=listeners[0])
        assert listeners[0].heard == []
        assert listeners[1].heard == ["before: a change of its own", "after: a change of its own"]

    def test_turns_within_a_change_are_not_heard(self, editor):
        listener = follow(editor, "begin", "applied")
        editor.on_turn = lambda _turn: pytest.fail("was called")
        editor.weights.change(lambda _: editor.edit(FACTS[TURN:]), "many turns")
        assert listener.heard == ["before: many turns", "after: many turns"]

    def test_a_change_that_fails_is_not_heard_of(self, editor):
        listener = follow(editor)
        before = everything(editor)

        def work(_before) -> None:
            editor.edit(FACTS[TURN:])
            raise MemoryError

        with pytest.raises(MemoryError):
            editor.weights.change(work, "many turns")
        assert_same_bits(everything(editor), before)
        assert listener.heard == ["before: many turns"] and not editor.followers.muted

    def test_other_originals_are_refused(self, editor):
        """Whoever follows reckons from those that there were."""
        follow(editor)
        with pytest.raises(ValueError, match="is followed"):
            editor.keep_original_weights()


class TestBehindTheBack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("how", ["in place", "new data", "new parameter"])
    @pytest.mark.parametrize("at_once", [True, False])
    def test_is_noticed_before_the_next_turn(self, at_once, how, dtype, tokenizer):
        editor = make(tokenizer, tiny_model("llama", dtype))
        editor.edit(FACTS[:TURN])
        follow(editor, "before")
        change_behind_its_back(editor, how)
        changed = weight_of(editor, MODULES[1]).clone()
        action = (lambda: editor.edit(FACTS[TURN:])) if at_once else editor.state_dict
        for _ in range(2):  # and again until somebody puts it right
            with pytest.raises(ValueError, match=rf"a change of {MODULES[1]} that went past the editor"):
                action()
        assert torch.equal(weight_of(editor, MODULES[1]), changed)

    def test_is_put_right_by_what_was_there(self, editor):
        follow(editor, "before")
        before, weight = everything(editor), weight_of(editor, MODULES[1]).clone()
        change_behind_its_back(editor)
        with pytest.raises(ValueError, match="went past the editor"):
            editor.edit(FACTS[TURN:])
        weight_of(editor, MODULES[1]).copy_(weight)
        assert_same_bits(everything(editor), before)
        editor.edit(FACTS[TURN:])

    def test_an_exchange_of_two_numbers_is_noticed(self, editor):
        follow(editor, "before")
        weight = weight_of(editor)
        weight[0, :2] = weight[0, :2].flip(0).clone()
        with pytest.raises(ValueError, match="went past the editor"):
            editor.edit(FACTS[TURN:])

    def test_moving_a_weight_is_no_change(self, tokenizer):
        """Its master stays, of which a half-precision weight does not say all."""
        editor = make(tokenizer, tiny_model("llama", torch.bfloat16), step_size=1e-5)
        editor.edit(FACTS[:TURN])
        listener, before = follow(editor, "before"), everything(editor)
        for module in editor.modules:
            module.module.weight = torch.nn.Parameter(module.weight.detach().clone())
        assert_same_bits(everything(editor), before)
        editor.edit(FACTS[TURN:])
        assert "begin" in listener.heard
        whole = make(tokenizer, tiny_model("llama", torch.bfloat16), step_size=1e-5)
        whole.edit(FACTS)
        assert_same_bits(everything(editor), everything(whole))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_masters_outlive_the_mode_they_were_made_in(context, tokenizer):
    inside, outside = (make(tokenizer, tiny_model("llama", torch.bfloat16)) for _ in range(2))
    with context():
        inside.edit(FACTS[:TURN])
    for editor in (inside, outside):
        editor.edit(FACTS[TURN if editor is inside else 0 :])
        editor.shrink(0.5)
    assert_same_bits(everything(inside), everything(outside))
