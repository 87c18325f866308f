"""Records that are on the disk or not there at all; damage that is found, named and never used."""

from __future__ import annotations

import errno
import os
import random
import resource
import sys

import pytest
import torch

from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.lifelong.journal.journal import Journal
from support.commands import started
from support.damage import KINDS, mutate


def content_of(number: int) -> dict:
    return {"kind": "note", "number": number, "text": "Straße " * number}


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {"left": torch.randn(3, number + 1, generator=generator), "rows": torch.arange(number)} if number else {}


@pytest.fixture
def journal(tmp_path) -> Journal:
    Journal.create(tmp_path, content_of(0))
    journal = Journal(tmp_path)
    for number in range(1, 8):
        journal.append(content_of(number), tensors_of(number))
    return journal


def limits(journal: Journal) -> list[tuple[int, int]]:
    return [(record.offset, record.end) for record in journal.records]


def test_what_was_written_is_read(journal):
    again = Journal(journal.path.parent)
    assert again.damage is None
    assert again.records == journal.records
    for number, record in enumerate(again.records):
        assert record.content == content_of(number)
        tensors = again.tensors(record)
        assert tensors.keys() == tensors_of(number).keys()
        assert all(torch.equal(tensor, tensors_of(number)[name]) for name, tensor in tensors.items())


def test_records_without_tensors_are_small(journal):
    assert journal.records[0].size < 300


@pytest.mark.parametrize("kind", KINDS)
def test_every_mutation_is_detected(kind, journal):
    """Nothing of what follows is used, and what is before is as it was."""
    original = journal.path.read_bytes()
    source = random.Random(kind)
    for _ in range(20):
        data = mutate(original, limits(journal), kind, source)
        assert data != original
        journal.path.write_bytes(data)
        found = Journal(journal.path.parent)
        assert found.damage is not None
        assert found.records == journal.records[: found.damage.record]
        assert f"record {found.damage.record} at byte {found.damage.offset}" in str(found.damage)
        # What the head knows of is lost; what lies behind it is no loss.
        assert found.damage.in_flight == (found.damage.record == len(journal.records))
        with pytest.raises(DamagedJournal, match="cannot be used"):
            found.append(content_of(8))


def test_every_truncation_is_detected(journal):
    original = journal.path.read_bytes()
    for size in range(0, len(original), 7):
        journal.path.write_bytes(original[:size])
        found = Journal(journal.path.parent)
        assert found.damage is not None
        assert not found.damage.in_flight


@pytest.mark.parametrize("part", [1, 50, 100, -1])
def test_a_record_in_flight_is_cut_off(part, journal):
    """The head does not know of it yet: nobody was told that it is done."""
    head = journal.path.with_name("head").read_bytes()
    complete = journal.path.read_bytes()
    journal.append(content_of(8), tensors_of(8))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[: len(complete) + part] if part > 0 else whole[:part])
    journal.path.with_name("head").write_bytes(head)

    found = Journal(journal.path.parent)
    assert found.damage.in_flight
    assert found.damage.record == 8
    aside = journal.path.parent / "removed" / "tail"
    removed = found.path.stat().st_size - len(complete)
    found.cut(aside)
    assert aside.stat().st_size == removed
    assert found.path.read_bytes() == complete
    found.append(content_of(8), tensors_of(8))
    assert found.path.read_bytes() == whole
    assert Journal(journal.path.parent).damage is None


def test_a_record_that_only_the_head_lacks_counts(journal):
    """A crash between the two: it is whole and on the disk."""
    head = journal.path.with_name("head").read_bytes()
    journal.append(content_of(8))
    journal.path.with_name("head").write_bytes(head)
    found = Journal(journal.path.parent)
    assert found.damage is None
    assert len(found.records) == 9
    found.acknowledge()
    found.path.write_bytes(found.path.read_bytes()[:-1])
    assert not Journal(journal.path.parent).damage.in_flight


def test_readable_records_after_the_damage(journal):
    data = bytearray(journal.path.read_bytes())
    data[journal.records[3].offset + 100] ^= 1
    journal.path.write_bytes(data)
    damage = Journal(journal.path.parent).damage
    assert damage.record == 3
    assert [record.number for record in damage.readable] == [4, 5, 6, 7]
    assert [record.content for record in damage.readable] == [content_of(number) for number in range(4, 8)]


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"records": 3, "digest": "00", "check": "00"}'])
def test_head_missing_or_bad(content, journal):
    head = journal.path.with_name("head")
    if content is None:
        head.unlink()
    else:
        head.write_bytes(content)
    damage = Journal(journal.path.parent).damage
    assert "head" in damage.reason
    assert not damage.in_flight


def test_another_journal_under_this_head(journal, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Journal.create(other, {"kind": "note"})
    for number in range(1, 9):
        Journal(other).append(content_of(number))
    journal.path.write_bytes((other / "journal").read_bytes())
    damage = Journal(journal.path.parent).damage
    assert "another journal" in damage.reason
    assert not damage.in_flight


def test_changed_after_it_was_checked(journal):
    record = journal.records[5]
    data = bytearray(journal.path.read_bytes())
    data[record.end - 40] ^= 1
    journal.path.write_bytes(data)
    with pytest.raises(DamagedJournal, match=r"record 5 at byte \d+ has changed"):
        journal.tensors(record)


def test_a_failed_append_leaves_no_trace(journal):
    """The limit is the system's own: a file may not become larger than this."""
    before = journal.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1, 70, 100, 200):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, limit[1]))
        try:
            with pytest.raises(OSError) as caught:
                journal.append(content_of(8), tensors_of(8))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert caught.value.errno == errno.EFBIG
        assert journal.path.read_bytes() == before
        assert Journal(journal.path.parent).damage is None
    journal.append(content_of(8), tensors_of(8))
    assert len(Journal(journal.path.parent).records) == 9


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_appending(journal, kills):
    """A child that appends as fast as it can is killed: all it was told is done is there."""
    code = (
        "import sys, pathlib, torch\n"
        "from stableedit_cpp.lifelong.journal.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "while True:\n"
        "    journal.append({'kind': 'note'}, {'x': torch.zeros(20000)})\n"
        "    print(len(journal.records), flush=True)\n"
    )
    source = random.Random(0)
    count = len(journal.records)
    for _ in range(kills):
        command = [sys.executable, "-c", code, str(journal.path.parent)]
        with started(command, text=True) as child:
            told = 0
            for _ in range(source.randint(1, 20)):
                told = int(child.stdout.readline())
            child.kill()
            rest = child.stdout.read().split()
            told = int(rest[-1]) if rest else told
        found = Journal(journal.path.parent)
        assert len(found.records) in (told, told + 1)
        assert found.damage is None or found.damage.in_flight
        found.cut(journal.path.parent / "removed" / "tail")
        found.acknowledge()
        assert len(found.records) > count
        count = len(found.records)
    assert os.path.getsize(journal.path) == found.end
