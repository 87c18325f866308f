"""Formats, field mappings, the hub, a look into a file, and memory that does not grow with a file."""

from __future__ import annotations

import builtins
import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from stableedit_cpp import EditRequest
from stableedit_cpp.cli import main
from stableedit_cpp.data import (
    FORMATS,
    choose_format,
    describe,
    iter_requests,
    parse_fields,
    read_records,
    read_requests,
)

ULTRA = {"prompt": "p", "rephrase_prompt": "r", "ans": "a", "loc": "l", "loc_ans": "la", "relation": "P1"}
PARAPHRASES = [f"paraphrase {number}" for number in range(10)]


def fever(index: int) -> dict[str, object]:
    return {
        "prompt": f"claim {index}",
        "equiv_prompt": PARAPHRASES,
        "unrel_prompt": "other claim",
        "unrel_ans": "SUPPORTS",
        "alt": "REFUTES",
    }


def write(path: Path, records: list[object]) -> Path:
    text = json.dumps(records) if ".jsonl" not in path.name else "".join(json.dumps(r) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# --- FEVER's paraphrases ---


def test_choice_among_paraphrases_is_seeded(tmp_path):
    path = write(tmp_path / "fever.json", [fever(index) for index in range(40)])
    chosen = [request.rephrase for request in read_requests(path, seed=1)]
    assert set(chosen) <= set(PARAPHRASES)
    assert len(set(chosen)) > 5  # drawn for each record anew
    assert chosen == [request.rephrase for request in read_requests(path, seed=1)]
    assert chosen != [request.rephrase for request in read_requests(path, seed=2)]


def test_choice_depends_on_neither_order_nor_limit(tmp_path):
    records = [fever(index) for index in range(12)]
    forward = write(tmp_path / "a.json", records)
    backward = write(tmp_path / "b.json", records[::-1])
    assert read_requests(forward) == read_requests(backward)[::-1]
    assert read_requests(forward, 5) == read_requests(forward)[:5]


def test_no_paraphrases():
    record = fever(0) | {"equiv_prompt": []}
    assert EditRequest.from_record(record).rephrase is None


def test_paraphrases_must_be_text():
    with pytest.raises(ValueError, match="rephrase must be text, not bool"):
        EditRequest.from_record(fever(0) | {"equiv_prompt": [True]})


# --- the format is that of the first record, or the given one ---


def test_a_record_is_not_taken_for_one_of_another_format(tmp_path):
    zsre = {"src": "q", "ans": "a", "alt": "b", "rephrase": "r"}
    path = write(tmp_path / "zsre.json", [zsre, zsre, {name: zsre[name] for name in ("src", "alt", "rephrase")}])
    words = r"record 2: the record lacks the field 'ans' \(target\) of the zsre format; its fields are: src, alt, reph"
    with pytest.raises(ValueError, match=words):
        read_requests(path)
    streamed = iter_requests(path)
    assert [next(streamed).target, next(streamed).target] == ["a", "a"]
    with pytest.raises(ValueError, match=words):
        next(streamed)


def test_given_format(tmp_path):
    path = write(tmp_path / "a.json", [{"src": "q", "ans": "a", "alt": "b", "loc": "l", "loc_ans": "x"}])
    assert read_requests(path)[0].target == "a"
    (request,) = read_requests(path, format="wikifactdiff")
    assert (request.target, request.locality_prompt) == ("b", "l")
    with pytest.raises(ValueError, match=r"record 0: the record lacks the field 'prompt' \(prompt\) and 'target_new"):
        read_requests(path, format="counterfact")


def test_field_mapping(tmp_path):
    record = {"question": "q", "answer": "a", "others": ["x"], "n": 7}
    path = write(tmp_path / "a.jsonl.gz", [record, record | {"others": None}, {"question": "q"}])
    fields = "prompt=question, target=answer ,rephrase=others,id=n"
    assert parse_fields(fields) == {"prompt": "question", "target": "answer", "rephrase": "others", "id": "n"}
    mapping = {"prompt": "question", "target": "answer", "rephrase": "others"}
    streamed = iter_requests(path, format=mapping)
    assert [next(streamed), next(streamed)] == [EditRequest("q", "a", rephrase="x"), EditRequest("q", "a")]
    # All fields that were asked for have to be there; null is an answer, absence is not.
    with pytest.raises(ValueError, match=r"line 3: .* lacks the field 'answer' \(target\) and 'others' \(rephr"):
        next(streamed)
    with pytest.raises(ValueError, match="line 2: the id '7' was used before, in line 1"):
        read_requests(path, format=parse_fields(fields))


@pytest.mark.parametrize(
    ("format_", "words"),
    [
        (
            "zser",
            "unknown data set format 'zser', did you mean 'zsre'? known are: stableedit, zsre, wikifactdiff, ",
        ),
        ("UltraEdit", "did you mean 'ultraeditbench'?"),
        ("xxx", "unknown data set format 'xxx'; known are: stableedit"),
        ({"prompt": "q", "targte": "a"}, "unknown field of an edit request 'targte', did you mean 'target'?"),
        ({"prompt": "q"}, "the field mapping lacks target; expected e.g. prompt=question,target=answer"),
        ({}, "the field mapping lacks prompt and target"),
    ],
)
def test_bad_format(format_, words):
    with pytest.raises(ValueError) as error:
        choose_format(format_)
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["", "prompt", "prompt=", "=question", "prompt=a,,target=b", "prompt=a,prompt=b"])
def test_bad_field_mapping(text):
    with pytest.raises(ValueError, match="--fields"):
        parse_fields(text)


# --- damage: what is whole is read, and the place is named ---


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("bad", [10, 1_900])
def test_place_of_damage_in_a_long_file(tmp_path, indent, bad):
    """Files of several chunks; the standard library, which reads them whole, says where the damage is."""
    records = [ULTRA | {"prompt": f"é{index}" * (1 + index % 40)} for index in range(2_000)]
    texts = [json.dumps(record, indent=indent, ensure_ascii=False) for record in records]
    texts[bad] = texts[bad].replace('"ans": ', '"ans": ?')
    text = "[" + ",\n".join(texts) + "]"
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + text, encoding="utf-8")
    streamed = read_records(path)
    read = []
    with pytest.raises(ValueError) as error:
        for _, record in streamed:
            read.append(record)
    assert read == records[:bad]
    place = f"line {expected.value.lineno}, column {expected.value.colno}"
    assert f"{path}, {place}: not valid JSON: " in str(error.value)


def test_damaged_gzip_says_how_far_it_was_readable(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", [ULTRA | {"prompt": f"p{index * 7919 % 10_007}"} for index in range(10_000)])
    path.write_bytes(path.read_bytes()[:-2_000])
    count = 0
    with pytest.raises(ValueError) as error:
        for _ in iter_requests(path):
            count += 1
    assert 0 < count < 10_000
    assert "not a complete gzip file: Compressed file ended before the end-of-stream marker" in str(error.value)
    assert str(error.value).endswith(f"; readable up to line {count}")


# --- memory ---


def peak_bytes(read) -> int:
    """Largest size of the Python objects alive while ``read`` runs."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    record = ULTRA | {"prompt": "What is the capital of the country of this name?" * 4}
    short, long = write(tmp_path / f"short{name}", [record] * 500), write(tmp_path / f"long{name}", [record] * 8_000)
    streamed = [peak_bytes(lambda path=path: sum(1 for _ in iter_requests(path))) for path in (short, long)]
    assert streamed[1] < streamed[0] + 200_000
    assert peak_bytes(lambda: read_requests(long)) > streamed[1] + 2_000_000  # what it would be


# --- hub ---


def test_hub_name(tmp_path):
    pytest.importorskip("datasets")
    # A directory of data files is loaded by the same call and streamed in the same way as a repository of the hub.
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", [ULTRA] * 3)
    write(tmp_path / "data" / "test.jsonl", [ULTRA | {"ans": "other"}])
    source = f"hub:{tmp_path / 'data'}"
    assert [request.target for request in iter_requests(source)] == ["a"] * 3
    assert [request.target for request in read_requests(f"{source}:test")] == ["other"]
    assert len(read_requests(source, 2)) == 2
    with pytest.raises(ValueError, match=r"cannot load hub:.*:dev: .*dev"):
        read_requests(f"{source}:dev")
    shown = describe(source, first=2)
    assert (shown.records, shown.complete, shown.format.name) == (2, False, "ultraeditbench")
    assert describe(source, count=True).records == 3


def test_hub_names_that_cannot_be_loaded(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="cannot load hub:"):
        read_requests(f"hub:{tmp_path / 'missing'}")
    with pytest.raises(ValueError, match="hub: is no hub name; expected hub:OWNER/NAME"):
        read_requests("hub:")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"needs the datasets package: pip install 'stableedit-cpp\[hub\]'"):
        read_requests("hub:owner/name")


# --- a look into a file ---


def test_describe(tmp_path):
    wiki = {"update": "u", "ans": "a", "rephrase": "r", "personas": "arr", "mhop": "m", "mhop_ans": "ma", "tag": "t"}
    none = {"mhop": None, "mhop_ans": None}
    shown = describe(write(tmp_path / "w.json", [wiki, wiki | none, wiki | none]), first=2, progress=False)
    assert (shown.format.name, shown.records, shown.complete) == ("wikibigedit", 3, True)
    assert shown.filled == {
        "prompt": 3,
        "target": 3,
        "rephrase": 3,
        "persona": 3,
        "multi_hop_prompt": 1,
        "multi_hop_target": 1,
    }
    assert len(shown.first) == 2
    assert shown.unused == ["tag"]
    lines = str(shown).splitlines()
    assert "multi_hop_prompt    mhop                    1, missing in 2" in lines
    assert "locality_prompt     loc                     0, missing in 3" in lines
    with pytest.raises(ValueError, match="holds no edit requests"):
        describe(write(tmp_path / "none.json", []))


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["datasets", "ls"]) == 0
    listing = capsys.readouterr().out
    for format_ in FORMATS:
        assert format_.name in listing.splitlines()
    assert main(["datasets", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {f.name: dict(f.fields) for f in FORMATS}

    write(Path("a.json.gz"), [{"question": "Who?", "answer": "Me"}] * 4)
    options = ["--fields", "prompt=question,target=answer", "--first", "1"]
    assert main(["datasets", "show", "a.json.gz", *options]) == 0
    shown = capsys.readouterr().out
    assert "records  4" in shown
    assert "  prompt            Who?" in shown
    assert "request 1" not in shown

    write(Path("b.json"), [{"src": "p", "ans": "t", "rephrase": "r"}])
    assert main(["datasets", "show", "b.json", "--variants", "rephrase"]) == 0
    shown = capsys.readouterr().out
    assert "  variant           r -> t" in shown and "rephrase          " not in shown.split("request 0")[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["show", "missing.json"], "there is no file missing.json"),
        (["show", "a.json"], "a.json, record 0: the record lacks a prompt or a target field; its fields are: question"),
        (["show", "a.json", "--format", "zsr"], "unknown data set format 'zsr', did you mean 'zsre'?"),
        (["show", "a.json", "--fields", "prompt:question"], "--fields has 'prompt:question'; expected NAME=FIELD"),
        (
            ["show", "a.json", "--fields", "prompt=question,target=reply"],
            "the record lacks the field 'reply' (target)",
        ),
        (["show", "a.json", "--variants", "rephase"], "'rephase', did you mean 'rephrase'?"),
    ],
)
def test_bad_commands(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    write(Path("a.json"), [{"question": "Who?", "answer": "Me"}])
    assert main(["datasets", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith("stableedit: error: ")
    assert captured.err.count("\n") == 1
