"""Editors that train in a session: reopened bit for bit, rolled back, audited and repaired; a revert is refused."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.lifelong import SessionView
from support.sessions import MODULES, assert_same_bits, create, reopen, state_of, stream, without_closing

CONFIGS = {"fine-tune": se.FineTuneConfig, "lora": se.LoRAConfig}


def config_of(editor: str, **changes) -> se.EditorConfig:
    settings = {"edit_modules": MODULES[1:], "step_size": 1e-2, "turn_size": 3, "epochs": 3, "micro_batch": 2}
    return CONFIGS[editor](**(settings | changes))


@pytest.mark.parametrize("detail", ["factors", "requests"])
@pytest.mark.parametrize(
    ("editor", "changes", "dtype"),
    [
        ("fine-tune", {}, torch.float32),
        ("fine-tune", {"cumulative": True}, torch.bfloat16),
        ("lora", {"dropout": 0.2, "replays": 16}, torch.float32),
    ],
)
def test_reopening_gives_the_same_bits(editor, changes, dtype, detail, tokenizer, tmp_path):
    config = config_of(editor, **changes)
    session = create(tmp_path / "s", tokenizer, dtype=dtype, config=config, detail=detail, snapshot_every=3)
    edits = stream(12)
    for begin in range(0, len(edits), 3):
        session.edit(edits[begin : begin + 3])
        without_closing(session)
        before, parts = state_of(session.editor), session.editor.state_dict()
        session = reopen(tmp_path / "s", tokenizer, dtype=dtype)
        assert_same_bits(state_of(session.editor), before)
        for part, state in session.editor.state_dict().items():
            assert_same_bits(state, parts[part])


@pytest.mark.parametrize("editor", list(CONFIGS))
def test_a_rollback_takes_turns_back_and_a_revert_is_refused(editor, tokenizer, tmp_path):
    with create(tmp_path / "s", tokenizer, config=config_of(editor)) as session:
        session.edit(stream(3))
        before = state_of(session.editor)
        session.edit(stream(6, 20))
        here = state_of(session.editor)
        words = f"'f23' cannot be reverted alone: a turn of {type(session.editor).__name__} changes the weights as one "
        words += r"whole, of which no part belongs to one request; rollback\(2\) takes back turn 3"
        with pytest.raises(ValueError, match=words):
            session.revert("f23")
        assert_same_bits(state_of(session.editor), here)
        session.rollback(1)
        assert_same_bits(state_of(session.editor), before)
        assert [request.id for request in session.current_requests()] == ["f0", "f1", "f2"]
        session.edit(stream(3, 40))
    assert SessionView(tmp_path / "s").history.turn == 4


def test_what_is_forgotten_is_trained_again(tokenizer, tmp_path):
    with create(tmp_path / "s", tokenizer, config=config_of("fine-tune", epochs=1)) as session:
        session.edit(stream(6))
        assert session.audit().forgotten
        session.repair(budget=3)
        before = state_of(session.editor)
        without_closing(session)
        assert_same_bits(state_of(reopen(tmp_path / "s", tokenizer).editor), before)
