"""Damage is found, named, and nothing behind it is used until somebody consents to losing it."""

from __future__ import annotations

import random
import threading

import pytest

from stableedit_cpp.data import read_requests
from stableedit_cpp.errors import DamagedJournal, SessionBusy
from stableedit_cpp.lifelong import SessionView, verify
from stableedit_cpp.lifelong.journal.journal import Journal
from support.damage import KINDS, mutate
from support.sessions import assert_same_bits, create, reopen, state_of, stream, without_closing


@pytest.fixture
def session(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, snapshot_every=2)
    session.edit(stream(15))
    without_closing(session)
    return session


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_sound(session):
    report = verify(session.directory)
    assert report.sound
    assert (report.records, report.snapshots) == (6, 3)
    assert "all sound" in str(report)
    assert verify(session.directory, repair=True).repairs == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_journal_is_not_opened(kind, session, tokenizer):
    original = session.journal.path.read_bytes()
    limits = [(record.offset, record.end) for record in session.journal.records]
    source = random.Random(kind)
    for _ in range(4):
        session.journal.path.write_bytes(mutate(original, limits, kind, source))
        damage = Journal(session.directory).damage
        assert damage.record == 0 or not verify(session.directory).sound
        if damage.in_flight:  # behind all that was done: cut off, and everything is there
            with pytest.warns(UserWarning, match="cut off a turn that was in flight"):
                found = reopen(session.directory, tokenizer)
            without_closing(found)
            assert_same_bits(state_of(found.editor), state_of(session.editor))
            continue
        with pytest.raises(DamagedJournal, match=f"record {damage.record} at byte {damage.offset}"):
            reopen(session.directory, tokenizer)


def test_damage_in_the_middle(session, tokenizer):
    record = session.journal.records[3]
    removed = session.journal.path.read_bytes()[record.offset :]
    flip(session.journal.path, record.offset + 200)
    removed = removed[:200] + bytes([removed[200] ^ 1]) + removed[201:]

    with pytest.raises(DamagedJournal, match=r"record 3 at byte \d+ cannot be used: its checksum is wrong.*verify"):
        reopen(session.directory, tokenizer)
    report = verify(session.directory)
    assert not report.sound
    assert "turn 4 to 5 among them" in str(report)
    assert SessionView(session.directory).status().damage

    repaired = verify(session.directory, repair=True)
    assert repaired.repaired
    assert verify(session.directory).sound
    kept = sorted((session.directory / "removed").iterdir())
    assert kept[0].read_bytes() == removed
    again = read_requests(kept[1])
    assert [request.id for request in again] == [f"f{number}" for number in range(9, 15)]

    session = reopen(session.directory, tokenizer)
    assert session.status().turn == 2
    assert "cut off with consent" in session.log()[-1].text
    # The requests of the damaged record itself are known from the file they came from.
    session.edit(stream(3, 6))
    session.edit(again)
    assert len(session.current_requests()) == 15


def test_first_record_damaged(session, tokenizer):
    flip(session.journal.path, 90)
    for look in (SessionView, verify, lambda directory: reopen(directory, tokenizer)):
        with pytest.raises(DamagedJournal, match=r"record 0 .+ without its first record a session is lost"):
            look(session.directory)


def test_a_damaged_snapshot_is_not_used(session, tokenizer):
    newest = session.snapshots.numbers()[-1]
    path = session.snapshots.path(newest)
    flip(path, path.stat().st_size - 100)
    report = verify(session.directory)
    assert str(path) in report.problems[0]
    with pytest.warns(UserWarning, match="using an earlier one"):
        found = reopen(session.directory, tokenizer)
    assert_same_bits(state_of(found.editor), state_of(session.editor))
    without_closing(found)
    verify(session.directory, repair=True)
    assert newest not in session.snapshots.numbers()
    assert verify(session.directory).sound


def test_a_snapshot_in_the_place_of_another(session, tokenizer):
    first, second, third = session.snapshots.numbers()
    session.snapshots.path(third).write_bytes(session.snapshots.path(second).read_bytes())
    assert "does not hold the state of record" in verify(session.directory).problems[0]
    with pytest.warns(UserWarning, match="does not hold the state of record"):
        found = reopen(session.directory, tokenizer)
    assert_same_bits(state_of(found.editor), state_of(session.editor))
    assert first == 0


def test_without_any_snapshot(session, tokenizer):
    """The unedited model is the first snapshot."""
    for number in session.snapshots.numbers():
        session.snapshots.path(number).unlink()
    found = reopen(session.directory, tokenizer)
    assert_same_bits(state_of(found.editor), state_of(session.editor))


def test_looking_on_while_another_writes(tokenizer, tmp_path):
    """Snapshots come and go, the journal grows: whoever looks on sees a sound session at each moment."""
    session = create(tmp_path / "s", tokenizer, snapshot_every=1, keep_snapshots=1)
    looks, found = [], []
    done = threading.Event()

    def look_on() -> None:
        while not done.is_set():
            try:
                looks.append(SessionView(session.directory).status().turn)
                found.extend(verify(session.directory).problems)
            except Exception as error:
                found.append(repr(error))

    thread = threading.Thread(target=look_on)
    thread.start()
    try:
        session.edit(stream(60))
    finally:
        done.set()
        thread.join()
    assert found == []
    assert len(set(looks)) > 3  # it did look on


def test_repairing_what_another_writes(session, tokenizer):
    with reopen(session.directory, tokenizer):
        assert verify(session.directory).sound
        with pytest.raises(SessionBusy):
            verify(session.directory, repair=True)
