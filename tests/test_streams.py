"""Streams that do not fit in memory: read once, checked as a whole, and worked on a few turns at a time."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import random
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.data import stream as streams
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.data.shelf import Shelf
from stableedit_cpp.data.spool import Seen, Spool
from stableedit_cpp.data.statements import content_digest
from stableedit_cpp.data.stream import as_stream, parts_of
from stableedit_cpp.data.superseding import Current, current_parts
from stableedit_cpp.editors.ahead import ahead
from stableedit_cpp.editors.statements import Statements
from stableedit_cpp.evaluation import asking
from stableedit_cpp.files.environment import resident_bytes
from stableedit_cpp.lifelong.audit import audit
from stableedit_cpp.model import linears
from support.editors import assert_same_bits, make, on_call, state_of
from support.tiny import FACTS, save_tiny


@pytest.fixture
def on_disk(monkeypatch):
    """Streams are kept on the disk from three requests on, and worked on in parts of four."""
    monkeypatch.setattr(streams, "LISTED", 2)
    monkeypatch.setattr(streams, "_PART", 4)


def contradicting(count: int, seed: int) -> list[se.EditRequest]:
    """Few questions with few answers, some of them as variants."""
    draw = random.Random(seed)

    def statement() -> tuple[str, str]:
        return f"question {draw.randrange(6)}", f"answer {draw.randrange(3)}"

    found = []
    while len(found) < count:
        (prompt, target), variants = statement(), dict(statement() for _ in range(draw.randrange(3)))
        variants.pop(prompt, None)
        found.append(se.EditRequest(prompt, target, variants=list(variants.items())))
    return found


def no_thread_is_left() -> bool:
    return not any(thread.name.startswith("stableedit") for thread in threading.enumerate())


class TestSpool:
    def test_is_the_sequence_of_its_requests(self):
        requests = [*as_requests(FACTS), *contradicting(20, 0)]
        requests.append(se.EditRequest("a", "b", id="x", aliases=["c"], subject="é\U0001f600"))
        spool = Spool((f"line {index}", request) for index, request in enumerate(requests))
        assert len(spool) == len(requests) and list(spool) == requests
        assert spool[3] == requests[3] and spool[-1] == requests[-1] and spool[2:9] == requests[2:9]
        assert spool[::5] == requests[::5] and spool[30:99] == requests[30:99]
        assert spool.places(4, 6) == ["line 4", "line 5"]
        with pytest.raises(IndexError):
            spool[len(requests)]

    def test_what_was_seen(self):
        seen = Seen()
        seen["a"] = "line 3"
        assert (seen.get("a"), seen.get("b"), "a" in seen, "b" in seen) == ("line 3", None, True, False)

    def test_a_full_disk_is_said(self):
        spool = Spool([])
        spool._database.execute("PRAGMA max_page_count=8")
        with pytest.raises(OSError, match=r"cannot be kept in a temporary file .*full.*TMPDIR"):
            spool._add([("", se.EditRequest("p" * 10_000, "t"))] * 10)

    def test_content(self):
        one = se.EditRequest("p", "t", variants=[("q", "u"), ("r", "v")])
        assert content_digest(one) == content_digest(
            se.EditRequest(" p ", "t", id="x", variants=[("r", "v"), ("q", "u")])
        )
        different = {content_digest(other) for other in (one, se.EditRequest("p", "t"), se.EditRequest("q", "u"))}
        assert len(different) == 3


class TestShelf:
    def test_gives_back_in_order(self):
        with Shelf() as shelf:
            assert list(shelf) == []
            things = [[((1, 2), (3,))], (), "x" * 100_000, {"a": 1.5}]
            for thing in things:
                shelf.put(thing)
            assert list(shelf) == things

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
    def test_a_full_disk_is_said(self, monkeypatch):
        full = partial(Path("/dev/full").open, "wb")
        monkeypatch.setattr("stableedit_cpp.data.shelf.TemporaryFile", full)
        with (
            pytest.raises(OSError, match=r"cannot be kept in a temporary file .*No space left.*TMPDIR"),
            Shelf() as shelf,
        ):
            shelf.put("x")


class TestReading:
    def test_few_are_a_list_and_many_are_not(self, tmp_path):
        path = tmp_path / "edits.jsonl"
        path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
        assert as_stream(iter(FACTS)) == as_stream(FACTS) == as_stream(path) == as_requests(FACTS)
        many = ({"prompt": f"p {index}", "target": "t"} for index in range(streams.LISTED + 1))
        found = as_stream(many)
        assert isinstance(found, Spool) and len(found) == streams.LISTED + 1 and found[-1].prompt == "p 10000"
        assert as_stream(found) is found
        assert isinstance(as_stream(list(found)), list)

    def test_errors_say_where(self, tmp_path, on_disk):
        path = tmp_path / "edits.jsonl"
        lines = [json.dumps(fact | {"id": str(index)}) for index, fact in enumerate(FACTS)]
        path.write_text("\n".join([*lines, '{"prompt": "x", "target": "y", "id": "3"}']))
        with pytest.raises(ValueError, match=r"edits.jsonl, line 14: the id '3' was used before, in line 4"):
            se.open_requests(path)
        with pytest.raises(ValueError, match="requests 1 and 6 have the same id 'a'"):
            as_stream(fact | {"id": "a"} if index in (1, 6) else fact for index, fact in enumerate(FACTS))
        with pytest.raises(ValueError, match="request 13: the record lacks a prompt"):
            as_stream(iter([*FACTS, {"x": 1}]))
        with pytest.raises(FileNotFoundError, match="there is no file"):
            as_stream(tmp_path / "no.jsonl")

    @pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one")
    def test_what_a_part_took_is_given_back(self, on_disk):
        kept, before = [], []
        for _ in parts_of(as_stream(iter(FACTS))):
            before.append(resident_bytes())
            freed = []
            for _ in range(500):  # what is kept lies between, so that the allocator gives nothing back by itself
                freed.append(bytearray(b"." * 100_000))
                kept.append(bytearray(1000))
            del freed
        assert len(before) == -(-len(FACTS) // 4)
        assert max(before) < before[0] + 15e6

    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_current(self, seed):
        requests = contradicting(40, seed)
        expected = current_parts(requests)
        found = Current(Spool(("", request) for request in requests))
        assert dict(zip(found.numbers, found.parts(found.numbers), strict=True)) == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_different_questions(self, seed):
        requests = contradicting(20, seed)
        spool = Spool(("", request) for request in requests)
        expected = list({request.question: request for request in requests}.values())
        assert [spool[number] for number in spool.different()] == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_contradictions_are_said_alike(self, seed, tokenizer, on_disk):
        requests, editor, said = contradicting(12, seed), make(tokenizer), []
        for given in (requests, iter(requests)):
            with pytest.warns(UserWarning, match="the later wins") as record:
                editor.edit(given)
            said.append(next(str(one.message) for one in record if "the later wins" in str(one.message)))
        assert said[0] == said[1]


class TestEditing:
    @pytest.mark.parametrize("kind", ["generator", "file"])
    def test_is_that_of_a_list(self, kind, tokenizer, tmp_path, on_disk):
        """Turns of two, so that most are prepared on a thread."""
        whole, editor = make(tokenizer, turn_size=2), make(tokenizer, turn_size=2)
        path = tmp_path / "edits.jsonl"
        path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
        expected = whole.edit(FACTS, outcomes=True)
        report = editor.edit(path if kind == "file" else iter(FACTS), outcomes=True)
        assert_same_bits(state_of(editor), state_of(whole))
        assert isinstance(report.requests, Spool) and list(report.requests) == expected.requests
        assert report.outcomes == expected.outcomes and report.failed == expected.failed
        assert no_thread_is_left()

    @pytest.mark.parametrize("bad", [{"prompt": "x" * 99, "target": "y"}, {"prompt": "x"}], ids=["long", "no target"])
    def test_nothing_is_edited_where_the_last_is_wrong(self, bad, tokenizer, tmp_path, on_disk):
        editor = make(tokenizer, turn_size=2)
        before = state_of(editor)
        with pytest.raises(ValueError, match="request 13"):
            editor.edit(iter([*FACTS, bad]))
        path = tmp_path / "edits.jsonl"
        path.write_text("".join(json.dumps(fact) + "\n" for fact in [*FACTS, bad]))
        with pytest.raises(ValueError, match=r"edits.jsonl, line 14"):
            editor.edit(path)
        assert_same_bits(state_of(editor), before)

    def test_what_ends_it_has_the_report(self, tokenizer, monkeypatch, on_disk):
        def fail():
            raise KeyboardInterrupt

        on_call(monkeypatch, 4, fail)
        with pytest.raises(KeyboardInterrupt) as stop:
            make(tokenizer, turn_size=2).edit(iter(FACTS))
        assert stop.value.report.edits == 6 and list(stop.value.report.requests)[:6] == as_requests(FACTS[:6])
        assert no_thread_is_left()

    def test_what_the_thread_raises_comes_behind_the_turns_before(self, tokenizer, monkeypatch, on_disk):
        editor, real = make(tokenizer, turn_size=2), Statements.tokens
        expected = make(tokenizer, turn_size=2)
        expected.edit(FACTS[:8])

        def tokens(self, requests, names=None):
            if self.tokenizer is not editor.tokenizer and names[0].startswith("request 8"):
                raise MemoryError("on the thread")
            return real(self, requests, names)

        monkeypatch.setattr(Statements, "tokens", tokens)
        with pytest.raises(MemoryError, match="on the thread") as stop:
            editor.edit(iter(FACTS))
        assert stop.value.report.edits == 8 and no_thread_is_left()
        assert_same_bits(state_of(editor), state_of(expected))


class TestAhead:
    def test_keeps_the_order_and_no_more_than_asked_for(self):
        made = []

        def items():
            for number in range(20):
                made.append(number)
                yield number

        with ahead(items(), 3) as found:
            for number in found:
                time.sleep(0.002)
                assert made[-1] <= number + 3
        assert made == list(range(20))

    def test_ends_with_what_is_under_way(self):
        made = []

        def items():
            while True:
                made.append(1)
                yield 1

        with pytest.raises(RuntimeError, match="enough"), ahead(items(), 2) as found:
            next(found)
            raise RuntimeError("enough")
        count = len(made)
        time.sleep(0.02)
        assert len(made) == count <= 4


class TestScores:
    @pytest.mark.parametrize("details", [None, True])
    def test_are_those_of_a_list(self, details, tokenizer, on_disk):
        editor = make(tokenizer)
        editor.edit(FACTS)
        local = [{"locality_prompt": fact["prompt"], "locality_target": "x"} for fact in FACTS[::-1]]
        requests = [fact | other for fact, other in zip(FACTS, local, strict=True)]
        requests[3] = {name: text for name, text in requests[3].items() if not name.startswith("locality")}
        how = {"metrics": ["generation", "exact_match", "locality"], "reference": editor.unedited}
        expected = se.evaluate(editor.model, tokenizer, requests, **how)
        scores = se.evaluate(editor.model, tokenizer, iter(requests), **how, details=details)
        assert scores.names == expected.names and scores.requests == len(FACTS)
        for name in scores:
            assert scores[name].scored == expected[name].scored and scores[name].skipped == expected[name].skipped
            if scores[name].scored:
                assert scores[name][:2] == pytest.approx(expected[name][:2], rel=1e-4, abs=1e-7)
            else:
                assert scores[name] == expected[name]
        kept = [(record["id"], record["efficacy"]) for record in scores.per_request]
        assert kept == [(record["id"], record["efficacy"]) for record in expected.per_request] * bool(details)
        assert ("per_request" in scores.to_dict()) == bool(details)
        assert str(scores) == str(expected)

    @pytest.mark.skipif(not linears._onednn(), reason="this torch has no oneDNN")
    def test_multiply_few_numbers_of_rows(self, tokenizer, monkeypatch, on_disk):
        rows, multiply = set(), linears._by_onednn
        monkeypatch.setattr(linears, "_by_onednn", lambda x, *rest: rows.add(len(x)) or multiply(x, *rest))
        model = make(tokenizer).model
        se.evaluate(model, tokenizer, iter(FACTS))
        assert rows and all(number % 64 == 0 for number in rows)
        rows.clear()
        se.evaluate(model, tokenizer, FACTS)  # as before there were streams
        assert any(number % 64 for number in rows)

    def test_texts_are_tokenised_once(self, tokenizer, monkeypatch, on_disk):
        sizes, tokenize = [], asking.tokenize

        def counted(tokenizer, pairs, *how):
            sizes.append(len(pairs))
            return tokenize(tokenizer, pairs, *how)

        monkeypatch.setattr(asking, "tokenize", counted)
        scores = se.evaluate(make(tokenizer).model, tokenizer, iter(FACTS), metrics=[])
        assert sum(sizes) == sum(score.scored for score in scores.values())

    def test_are_not_begun_where_the_last_is_wrong(self, tokenizer, monkeypatch, on_disk):
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda *_: pytest.fail("the model was run"))
        with pytest.raises(ValueError, match=r"request 13, efficacy: prompt and target have"):
            se.evaluate(make(tokenizer).model, tokenizer, iter([*FACTS, {"prompt": "x" * 99, "target": "y"}]))

    @pytest.mark.parametrize("sample", [None, 9, 2])
    def test_audit(self, sample, tokenizer, monkeypatch, on_disk):
        monkeypatch.setattr(sys.modules[audit.__module__], "LISTED", 3)
        editor = make(tokenizer)
        editor.edit(FACTS)
        requests = [*as_requests(FACTS), se.EditRequest(FACTS[2]["prompt"], "other")]
        expected = audit(editor, requests, sample=sample)
        found = audit(editor, iter(requests), sample=sample)
        assert (found.requests, found.superseded, found.audited) == (13, 1, expected.audited)
        assert found.forgotten == expected.forgotten and found.held_share == expected.held_share
        assert found.efficacy == pytest.approx(expected.efficacy) and str(found) == str(expected)
        assert found.entries == (expected.entries if sample == 2 else [])
        kept = audit(editor, iter(requests), sample=sample, details=True).entries
        for one, other in zip(kept, expected.entries, strict=True):  # of forward passes with other prompts
            assert one == dataclasses.replace(other, probability=pytest.approx(other.probability, rel=1e-5))


def test_memory_does_not_grow_with_a_stream(tokenizer, on_disk):
    """Objects alive after reading and checking a stream five times as long are no more."""

    def alive(count: int) -> int:
        found = as_stream({"prompt": f"p {index}", "target": "t", "id": str(index)} for index in range(count))
        make(tokenizer).check(found)
        gc.collect()
        return len(gc.get_objects())

    alive(500)
    few = alive(500)
    assert alive(3000) < few + 500


def test_a_file_of_scores_without_those_of_each_request(tmp_path, on_disk, capsys):
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    command = ["evaluate", "--model", str(tmp_path / "model"), "--requests", str(tmp_path / "edits.jsonl")]
    command += ["--metrics", "accuracy", "--output", str(tmp_path / "scores.json")]
    found = []
    for more in ([], ["--no-per-request"]):
        assert main([*command, *more]) == 0
        found.append(json.loads((tmp_path / "scores.json").read_text()))
    assert len(found[0].pop("per_request")) == len(FACTS) and "per_request" not in found[1]
    assert found[0]["efficacy"] == found[1]["efficacy"] and "scores are in" in "".join(capsys.readouterr())
