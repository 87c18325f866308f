"""Journal and model say the same, whatever fails: what a session follows, what it refuses, and when it snapshots."""

from __future__ import annotations

import time

import pytest
import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.lifelong import LifelongSession, SessionView
from stableedit_cpp.lifelong.history import History
from stableedit_cpp.lifelong.journal.journal import Journal
from stableedit_cpp.lifelong.journal.snapshots import Snapshots, is_state
from stableedit_cpp.lifelong.journal.writer import Recorder
from support.answers import none_takes
from support.editors import assert_same_bits, weight_of
from support.faults import Alarm, Faults, alarms, everything, instants
from support.sessions import MODULES, config_of, create, reopen, stream, without_closing
from support.tiny import tiny_model

SMALL = config_of(turn_size=2)


def agree(session) -> bool:
    """Whether the state is that which the history says, and the history that of the journal on the disk."""
    view = SessionView(session.directory)
    history = view.history
    return (
        view.journal.damage is None
        and history.line == session.history.line
        and is_state(session.editor.state_dict(), history.states[history.turn])
    )


@pytest.fixture
def session(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, config=SMALL, snapshot_every=2)
    session.edit(stream(2))
    return session


def updates_of(editor) -> dict[str, LowRankUpdate]:
    return {
        module.name: LowRankUpdate(torch.ones(module.shape[1], 1), torch.ones(1, module.shape[0]))
        for module in editor.modules
    }


class TestSnapshots:
    @pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError, OSError, ValueError])
    def test_that_fail_lose_no_turn(self, error, session, tokenizer, monkeypatch):
        """The turn is in the journal by then, so it stays in the model, and a later turn is written after it."""

        def fail(*_args) -> None:
            raise error("no room")

        with monkeypatch.context() as patch:
            patch.setattr(Snapshots, "save", fail)
            with pytest.warns(UserWarning, match=r"cannot write a snapshot after turn 2 \(no room\)"):
                session.edit(stream(2, 2))
            assert agree(session) and session.history.turn == 2
        session.edit(stream(6, 4))
        assert agree(session)
        after = everything(session.editor)
        without_closing(session)
        session = reopen(session.directory, tokenizer)
        assert_same_bits(everything(session.editor), after)
        assert len(session.current_requests()) == 10

    def test_that_are_interrupted_lose_no_turn(self, session, tokenizer, monkeypatch):
        def interrupt(*_args) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Snapshots, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.edit(stream(6, 2))
        assert agree(session) and session.history.turn == 2
        monkeypatch.undo()
        session.edit(stream(4, 4))
        after = everything(session.editor)
        without_closing(session)
        assert_same_bits(everything(reopen(session.directory, tokenizer).editor), after)

    def test_are_of_the_recorded_state_only(self, session):
        with torch.no_grad():
            weight_of(session.editor, MODULES[0])[0, 0] += 1.0
        with pytest.warns(UserWarning, match="cannot write a snapshot after turn 1"):
            session.close()
        assert session.snapshots.numbers() == [0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda editor: editor.weights.add(updates_of(editor)), "adding updates"),
            (lambda editor: editor.shrink(0.5), "shrinking what was added"),
            (lambda editor: editor.load_state_dict(editor.state_dict()), "loading a state"),
            (lambda editor: editor.checkpoint().restore(), "going back to a checkpoint"),
        ],
    )
    def test_of_what_would_be_missing_in_the_journal(self, change, what, session):
        before = everything(session.editor)
        with pytest.raises(ValueError, match=f"{what} would be missing in its journal; use the session's own methods"):
            change(session.editor)
        assert_same_bits(everything(session.editor), before)
        session.close()
        change(session.editor)  # the editor is free again

    @pytest.mark.parametrize("call", ["edit", "rollback", "revert", "repair"])
    def test_of_weights_that_were_changed_behind_its_back(self, call, session, tokenizer):
        before = everything(session.editor)
        with torch.no_grad():
            weight_of(session.editor, MODULES[1])[3, 3] += 1e-3
        arguments = {"edit": [stream(2, 2)], "rollback": [0], "revert": ["f0"], "repair": []}[call]
        with pytest.raises(ValueError, match=rf"a change of {MODULES[1]} that went past the editor would be missing"):
            getattr(session, call)(*arguments)
        assert len(SessionView(session.directory).journal.records) == 2
        with pytest.warns(UserWarning, match="cannot write a snapshot"):
            session.close()
        session = reopen(session.directory, tokenizer)
        assert_same_bits(everything(session.editor), before)

    def test_of_statistics_that_were_changed_behind_its_back(self, session):
        (normalizer,) = session.editor.normalizers.values()
        normalizer.observe(torch.randn(3, normalizer.key_dim), torch.randn(3, normalizer.value_dim))
        with pytest.raises(ValueError, match="weights or statistics of the editor are no longer those after turn 1"):
            session.edit(stream(2, 2))
        assert len(SessionView(session.directory).journal.records) == 2

    def test_of_a_listener_come_before_the_record(self, session):
        """What it refuses is not in the journal."""
        before = everything(session.editor)

        def refuse(_turn) -> None:
            raise OSError("the listener's disk is full")

        session.editor.on_turn = refuse
        with pytest.raises(OSError, match="the listener's disk is full"):
            session.edit(stream(2, 2))
        assert_same_bits(everything(session.editor), before)
        assert agree(session) and session.history.turn == 1
        session.editor.on_turn = None
        session.edit(stream(2, 2))
        assert agree(session) and session.history.turn == 2


class TestFailuresAtEveryStep:
    """Of what a session does itself: model and journal stay as they were."""

    @pytest.mark.parametrize(
        "action",
        [
            lambda session: session.edit(stream(2, 6)),
            lambda session: session.rollback(1),
            lambda session: session.revert("f1", others=2),
        ],
        ids=["edit", "rollback", "revert"],
    )
    @pytest.mark.parametrize("detail", ["factors", "requests"])
    def test_nothing_has_changed(self, detail, action, tokenizer, tmp_path, monkeypatch):
        session = create(tmp_path / "s", tokenizer, config=SMALL, detail=detail, snapshot_every=100)
        session.edit(stream(6))
        before, journal = everything(session.editor), session.journal.path.read_bytes()
        twin = create(tmp_path / "twin", tokenizer, config=SMALL, detail=detail, snapshot_every=100)
        twin.edit(stream(6))
        with monkeypatch.context() as patch:
            faults = Faults(patch)
            moments = list(faults.moments(lambda: action(twin)))
            for moment in moments[:: max(1, len(moments) // 40)]:
                with faults.failing(moment):
                    action(session)
                assert session.journal.path.read_bytes() == journal
                assert_same_bits(everything(session.editor), before)
        assert agree(session)
        action(session)
        assert_same_bits(everything(session.editor), everything(twin.editor))
        assert agree(session)

    def test_a_record_that_is_only_on_the_disk_stops_the_session(self, session, tokenizer, monkeypatch):
        """Reopened it has the turn; until then nothing can be written after it."""
        before = everything(session.editor)

        def fail(*_args) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(History, "add", fail)
            with pytest.raises(MemoryError):
                session.edit(stream(2, 2))
        assert_same_bits(everything(session.editor), before)
        with pytest.raises(ValueError, match=r"on the disk, but not in the session's memory .* reopen the session"):
            session.edit(stream(2, 4))
        without_closing(session)
        session = reopen(session.directory, tokenizer)
        assert session.history.turn == 2 and agree(session)
        session.edit(stream(2, 4))


@pytest.mark.parametrize("owner, name", [(Snapshots, "save"), (Journal, "append"), (Recorder, "__init__")])
def test_a_session_that_cannot_begin(owner, name, tokenizer, tmp_path, monkeypatch):
    """The model stays as it is; the directory is not there, or holds a session without a turn, whole."""
    model = tiny_model("llama")

    def fail(*_args) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(MemoryError):
            LifelongSession.create(tmp_path / "s", model, tokenizer, SMALL)
    assert model_digest(model) == model_digest(tiny_model("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["s"] * (owner is Recorder)
    if owner is Recorder:
        assert reopen(tmp_path / "s", tokenizer).history.turn == 0
    else:
        create(tmp_path / "s", tokenizer, config=SMALL).edit(stream(2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal came within a __del__
@pytest.mark.parametrize("passes", [1, 3])
def test_signals_that_raise_anywhere(passes, tokenizer, tmp_path, monkeypatch):
    """An application's handler may cut off anything; what is in the journal is in the model, and nothing else."""
    none_takes(monkeypatch)
    config = config_of(turn_size=2, max_passes=passes, past_key_weight=0.02)
    session = create(tmp_path / "s", tokenizer, config=config, snapshot_every=2)
    begin = time.perf_counter()
    session.edit(stream(2, 2000))  # how long it takes here
    interrupted = written = 0
    with alarms() as alarm:
        for number, instant in enumerate(instants(time.perf_counter() - begin, 40)):
            turn = session.history.turn
            try:
                alarm(instant)
                session.edit(stream(2, 2 * number))
                alarm(0)
            except Alarm:
                interrupted += 1
                written += session.history.turn > turn
            assert agree(session)
    assert interrupted > 0
    session.edit(stream(2, 1000))
    session.rollback(session.history.line[-2])
    assert agree(session)
    after = everything(session.editor)
    without_closing(session)
    assert_same_bits(everything(reopen(tmp_path / "s", tokenizer).editor), after)
