"""Disks that are full or read-only: a sentence, nothing half-done, and the session goes on afterwards."""

from __future__ import annotations

import contextlib
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from stableedit_cpp.lifelong import SessionView, SessionWriteError, verify
from support.sessions import assert_same_bits, create, files_no_larger_than, reopen, state_of, stream

SIZE = 2_000_000


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - leave)
    return filler


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_turn_that_does_not_fit(room, tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer)
    session.edit(stream(6))
    before, size = state_of(session.editor), session.journal.path.stat().st_size
    with files_no_larger_than(size + room), pytest.raises(SessionWriteError, match="cannot record turn 3"):
        session.edit(stream(3, 6))
    assert_same_bits(state_of(session.editor), before)
    assert session.journal.path.stat().st_size == size
    assert session.status().turn == 2
    session.edit(stream(3, 6))
    after = state_of(session.editor)
    session.close()
    assert_same_bits(state_of(reopen(tmp_path / "s", tokenizer).editor), after)


def test_turns_before_the_one_that_does_not_fit_are_done(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer)
    session.edit(stream(3))
    record = session.journal.records[-1].size
    with files_no_larger_than(session.journal.end + int(2.5 * record)), pytest.raises(SessionWriteError):
        session.edit(stream(12, 3))
    assert session.status().turn == 3
    assert len(session.current_requests()) == 9


def test_a_snapshot_that_cannot_be_written_is_no_error(tokenizer, tmp_path):
    """The turn is in the journal; another snapshot is tried after the next."""
    session = create(tmp_path / "s", tokenizer, snapshot_every=2)
    place, aside = session.snapshots.directory, tmp_path / "aside"
    place.rename(aside)
    place.touch()
    with pytest.warns(UserWarning, match="cannot write a snapshot after turn 2"):
        session.edit(stream(6))
    assert session.status().turn == 2
    place.unlink()
    aside.rename(place)
    session.edit(stream(3, 6))
    assert session.snapshots.numbers() == [0, 3]


def test_full_disk(small_disk, tokenizer):
    session = create(small_disk / "s", tokenizer)
    session.edit(stream(3))
    before = state_of(session.editor)
    for leave in (0, 4096, session.journal.records[-1].size // 2):
        filler = fill(small_disk, leave)
        with pytest.raises(SessionWriteError, match="No space left on device"):
            session.edit(stream(3, 3))
        assert_same_bits(state_of(session.editor), before)
        assert verify(small_disk / "s").sound
        filler.unlink()
    filler = fill(small_disk, 0)
    with pytest.warns(UserWarning, match="cannot write a snapshot"):
        session.close()
    with warnings.catch_warnings():  # opening needs no room
        warnings.simplefilter("error")
        session = reopen(small_disk / "s", tokenizer)
    assert_same_bits(state_of(session.editor), before)
    filler.unlink()
    session.edit(stream(3, 3))


def test_a_torn_record_on_a_full_disk(small_disk, tokenizer):
    """What is most likely to be found after a disk has become full."""
    session = create(small_disk / "s", tokenizer)
    session.edit(stream(3))
    before = state_of(session.editor)
    session.close()
    journal = session.journal.path
    journal.write_bytes(journal.read_bytes() + b"SEjr" + bytes(10_000))
    (session.snapshots.directory / ".record-000002.safetensors-17-0.tmp").write_bytes(b"left by a crash")
    torn = journal.read_bytes()
    filler = fill(small_disk, 4096)
    with pytest.raises(SessionWriteError, match=r"in flight, but its 10004 bytes cannot be kept in .*No space left"):
        reopen(small_disk / "s", tokenizer)
    assert journal.read_bytes() == torn
    filler.unlink()
    with pytest.warns(UserWarning, match="cut off a turn that was in flight"):
        session = reopen(small_disk / "s", tokenizer)
    assert_same_bits(state_of(session.editor), before)
    assert not list(session.snapshots.directory.glob(".*"))
    session.edit(stream(3, 3))


def test_no_room_for_a_new_session(small_disk, tokenizer):
    fill(small_disk, 8192)
    with pytest.raises(SessionWriteError, match=r"the session .*s cannot be made \(.*No space left on device"):
        create(small_disk / "s", tokenizer)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_read_only(small_disk, tokenizer):
    session = create(small_disk / "s", tokenizer)
    session.edit(stream(3))
    before = state_of(session.editor)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    remount("ro")
    with pytest.raises(SessionWriteError, match=r"cannot record turn 2 \(Read-only file system\)"):
        session.edit(stream(3, 3))
    assert_same_bits(state_of(session.editor), before)
    assert SessionView(small_disk / "s").status().turn == 1
    with pytest.raises(OSError, match="Read-only file system"):
        create(small_disk / "other", tokenizer)
    remount("rw")
    session.edit(stream(3, 3))
    session.close()
    remount("ro")
    with pytest.raises(OSError, match=r"cannot be opened for writing \(Read-only file system\); it can only be read"):
        reopen(small_disk / "s", tokenizer)
    with pytest.raises(OSError, match="cannot be opened for writing"):
        verify(small_disk / "s", repair=True)
    assert verify(small_disk / "s").sound
    assert len(SessionView(small_disk / "s").log()) == 3
