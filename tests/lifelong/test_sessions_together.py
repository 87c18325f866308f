"""Sessions of several processes: one journal, the bits of one process, and whole turns whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from support.ranks import together
from support.tiny import FACTS, tiny_model, tiny_tokenizer

CONFIG = se.UltraEditConfig(
    turn_size=2, step_size=1e-2, edit_modules=["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
)
SETTINGS = {"snapshot_every": 2, "keep_snapshots": 2}


def state_of(session: se.LifelongSession) -> dict[str, torch.Tensor]:
    parts = session.editor.state_dict().items()
    return {f"{part}/{key}": tensor.clone() for part, fields in parts for key, tensor in fields.items()}


def create(directory: Path, **settings) -> se.LifelongSession:
    return se.LifelongSession.create(directory, tiny_model("llama"), tiny_tokenizer(), CONFIG, **(SETTINGS | settings))


def reopened(directory: Path) -> se.LifelongSession:
    return se.LifelongSession.open(directory, tiny_model("llama"), tiny_tokenizer(), progress=False)


def records(directory: Path) -> list[dict]:
    """What the journal says, but when it was written."""
    return [
        {key: value for key, value in record.content.items() if key not in ("time", "report", "environment")}
        for record in se.lifelong.SessionView(directory).journal.records
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict], float]:
    """Where one process comes to, what it writes, and how long it takes."""
    directory = tmp_path_factory.mktemp("alone") / "session"
    with create(directory) as session:
        begin = time.monotonic()
        session.edit(FACTS, progress=False)
        return state_of(session), records(directory), time.monotonic() - begin


def assert_same(first: dict[str, torch.Tensor], second: object) -> None:
    assert isinstance(second, dict), second
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_one_journal_with_the_bits_of_one_process(detail, alone, tmp_path):
    directory = tmp_path / "session"

    def first(rank: int) -> None:
        with se.data_parallel(), create(directory, detail=detail) as session:
            session.edit(FACTS[:5], progress=False)

    def second(rank: int) -> tuple:
        with se.data_parallel(), reopened(directory) as session:
            session.edit(session.pending(FACTS), progress=False)
            found = state_of(session), session.audit(progress=False).to_dict()
            session.rollback(1, progress=False)
            return (*found, state_of(session))

    for name, work in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        results = together(2, work, tmp_path / name)
    (state, audit, rolled), (other, other_audit, other_rolled) = results
    assert audit == other_audit
    assert_same(state, other)
    assert_same(rolled, other_rolled)
    assert se.lifelong.SessionView(directory).journal.damage is None
    # Five and then eight requests are other turns than thirteen are.
    assert len(records(directory)) == 1 + 3 + 4 + 1
    with reopened(directory) as session:  # by one process
        assert_same(rolled, state_of(session))

    def whole(rank: int) -> dict:
        with se.data_parallel(), create(tmp_path / "whole") as session:
            session.edit(FACTS, progress=False)
            return state_of(session)

    if detail == "factors":
        (tmp_path / "c").mkdir()
        for result in together(2, whole, tmp_path / "c"):
            assert_same(alone[0], result)
        assert records(tmp_path / "whole") == alone[1]


def test_a_session_is_open_in_all_of_them_or_in_none(tmp_path):
    with create(tmp_path / "session"):
        results = together(2, lambda rank: [None for _ in [_opened(tmp_path / "session")]], tmp_path)
    assert [type(result) for result in results] == [se.SessionBusy] * 2


def _opened(directory: Path) -> None:
    with se.data_parallel(), reopened(directory):
        pass


def killed(rank: int, seconds: float, directory: Path, meet: Path) -> list[object]:
    """Edit what is left with two processes, of which one is killed after a while."""

    def work(own: int) -> int:
        with se.data_parallel(), reopened(directory) as session:
            if own == rank:
                threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
            return session.edit(session.pending(FACTS), progress=False).edits

    meet.mkdir()
    return together(2, work, meet)


def kills(count: int, alone: tuple, tmp_path: Path) -> None:
    drawn, stopped = random.Random(0), 0
    for number in range(count):
        directory = tmp_path / f"session{number}"
        create(directory).close()
        rank = drawn.randrange(2)
        results = killed(rank, drawn.uniform(0.0, 0.8 * alone[2]), directory, tmp_path / f"meet{number}")
        stopped += results[rank] is None
        if results[rank] is None:
            assert isinstance(results[1 - rank], se.RankLost) or results[1 - rank] == len(FACTS), results
        view = se.lifelong.SessionView(directory)
        assert view.journal.damage is None or view.journal.damage.in_flight
        done = [entry for entry in records(directory) if entry["kind"] == "edit"]
        assert done == [entry for entry in alone[1] if entry["kind"] == "edit"][: len(done)]  # whole turns, no other

        def rest(own: int, directory: Path = directory) -> dict:
            with se.data_parallel(), reopened(directory) as session:
                session.edit(session.pending(FACTS), progress=False)
                return state_of(session)

        (tmp_path / f"rest{number}").mkdir()
        for result in together(2, rest, tmp_path / f"rest{number}"):
            assert_same(alone[0], result)
    assert stopped > 0


def test_whoever_is_killed_the_same_call_goes_on(alone, tmp_path):
    kills(2, alone, tmp_path)


@pytest.mark.slow
def test_whoever_is_killed_the_same_call_goes_on_ten_times(alone, tmp_path):
    kills(10, alone, tmp_path)
