"""Reading edit requests from files, good and bad, and the real data sets."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableedit_cpp import EditRequest, read_requests
from stableedit_cpp.data import read_records

DATA = Path(__file__).parents[2] / "shared" / "data"
FIELDS = tuple(field.name for field in dataclasses.fields(EditRequest))
KINDS = ("json", "jsonl", "ndjson", "csv")
TWO = [
    EditRequest("The capital of Åland is", "Mariehamn", rephrase='"Åland", capital?', id="1"),
    EditRequest("2 + 2 =", "4"),
]


def as_text(requests: list[EditRequest], kind: str) -> str:
    if kind == "json":
        return json.dumps([request.to_dict() for request in requests])
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(request.to_dict(), ensure_ascii=False) + "\n" for request in requests)
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, FIELDS)
    writer.writeheader()
    writer.writerows(request.to_dict() for request in requests)
    return buffer.getvalue()


def write(path: Path, content: str | bytes) -> Path:
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file(tmp_path, kind, bom, compressed):
    path = write(tmp_path / f"some.name.{kind}{compressed}", bom + as_text(TWO, kind))
    assert read_requests(path) == TWO
    assert read_requests(str(path)) == TWO


@pytest.mark.parametrize("name", ["A.JSON", "a.Jsonl", "A.CSV.GZ"])
def test_suffix_in_capitals(tmp_path, name):
    kind = name.lower().split(".")[1]
    assert read_requests(write(tmp_path / name, as_text(TWO, kind))) == TWO


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_and_line_ends(tmp_path, kind, newline):
    lines = as_text(TWO, kind).splitlines()
    blank = f"{newline}{newline}" if kind == "csv" else f"{newline} \t{newline}{newline}"
    path = write(tmp_path / f"a.{kind}", blank.join(lines) + newline + newline)
    assert read_requests(path) == TWO
    assert read_requests(write(tmp_path / f"b.{kind}", newline.join(lines))) == TWO  # no newline at the end


def test_csv_cell_with_a_newline(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,target\r\n"two\nlines",t\r\nq,u\r\n')
    assert read_requests(path) == [EditRequest("two\nlines", "t"), EditRequest("q", "u")]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_unicode_line_separator_is_no_line_end(tmp_path, kind):
    requests = [EditRequest("a\u2028b\x85c", "t")]
    text = json.dumps(requests[0].to_dict(), ensure_ascii=False)
    assert read_requests(write(tmp_path / f"a.{kind}", f"[{text}]" if kind == "json" else text)) == requests


@pytest.mark.parametrize("kind", KINDS)
def test_limit(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", as_text(TWO, kind))
    assert read_requests(path, 1) == TWO[:1]
    assert read_requests(path, limit=5) == TWO


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_limit_reads_no_further(tmp_path, kind):
    path = write(tmp_path / f"a.{kind}", as_text(TWO, kind) + '{"broken\n"broken"x')
    assert read_requests(path, 2) == TWO
    with pytest.raises(ValueError, match="line 4" if kind == "csv" else "line 3"):
        read_requests(path)


def test_records_keep_fields_of_their_own_and_say_where(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "p", "ans": "a", "relation": "P1"}\n\n{"x": 1}\n')
    assert list(read_records(path)) == [("line 1", {"prompt": "p", "ans": "a", "relation": "P1"}), ("line 3", {"x": 1})]


text = st.text(max_size=12)
nonblank = text.filter(str.strip)


@st.composite
def request_lists(draw) -> list[EditRequest]:
    ids = draw(st.lists(st.none() | nonblank, max_size=4, min_size=1, unique_by=lambda id: id or object()))
    optional = st.none() | nonblank
    return [
        EditRequest(draw(nonblank), draw(nonblank), draw(optional), draw(optional), draw(optional), draw(optional), id)
        for id in ids
    ]


@settings(deadline=None, max_examples=50)
@given(requests=request_lists(), kind=st.sampled_from(KINDS), compressed=st.booleans())
def test_round_trip(tmp_path_factory, requests, kind, compressed):
    path = tmp_path_factory.getbasetemp() / f"round_trip.{kind}{'.gz' if compressed else ''}"
    assert read_requests(write(path, as_text(requests, kind))) == requests


@settings(deadline=None, max_examples=150)
@given(
    content=st.binary(max_size=40) | st.text(alphabet='[]{}",:\n\r\\promtage1é', max_size=40).map(str.encode),
    name=st.sampled_from([f"noise.{kind}{gz}" for kind in KINDS for gz in ("", ".gz")]),
)
def test_no_content_gives_anything_but_requests_or_a_value_error(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        assert read_requests(path)
    except ValueError as error:
        assert str(path) in str(error)


# --- bad files: name, content, words of the message ---

GOOD = '{"prompt": "p", "target": "t"}'
LACKS = "the record lacks the field 'target' (target) of the stableedit format; its fields are: prompt, answer"
UNKNOWN = "the record lacks a prompt or a target field; its fields are: prompt, answer; expected prompt and target"
BAD_FILES = [
    ("a.json", "", "is empty"),
    ("a.json", " \n\t\n", "is empty"),
    ("a.json", "\ufeff", "is empty"),
    ("a.json", "[]", "holds no edit requests"),
    ("a.jsonl", "", "holds no edit requests"),
    ("a.jsonl", " \n\n", "holds no edit requests"),
    ("a.csv", "", "holds no edit requests"),
    ("a.csv", "\n\n", "holds no edit requests"),
    ("a.csv", "prompt,target\n", "holds no edit requests"),
    ("a.json.gz", "", "is empty"),
    ("a.jsonl.gz", "", "holds no edit requests"),
    ("a.json", b'[{"prompt": "caf\xe9", "target": "t"}]', "is not UTF-8 text"),
    ("a.jsonl", GOOD.encode() + b"\n\xff\xfe\n", "is not UTF-8 text"),
    ("a.csv", b"prompt,target\ncaf\xe9,t\n", "is not UTF-8 text"),
    ("a.csv.gz", b"prompt,target\ncaf\xe9,t\n", "is not UTF-8 text"),
    ("a.json", GOOD.encode("utf-16"), "holds an object"),
    ("a.json", f"[{GOOD},\n{GOOD},\n{{]", "line 3, column 2: not valid JSON"),
    ("a.json", f"[{GOOD}", "line 1, column 32: not valid JSON"),
    ("a.json", f"{GOOD}\n{GOOD}\n", "holds an object; expected a list of objects, or the suffix .jsonl"),
    ("a.jsonl", f"{GOOD}\n\n{GOOD}\n{{'prompt': 1}}\n{GOOD}\n", "line 4, column 2: not valid JSON"),
    ("a.jsonl.gz", f"{GOOD}\n{GOOD}\nnull,\n", "line 3, column 5: not valid JSON"),
    ("a.csv", "prompt,target\np,t\n\np,t\np,t,extra\np,t\n", "line 5: more cells than the header"),
    ("a.csv", "prompt,target\np,t\np\np,t\n", "line 3: fewer cells than the header"),
    ("a.csv", 'prompt,target\np,t\n"p"q,t\np,t\n', "line 3: not valid CSV"),
    ("a.csv", 'prompt,target\np,t\n"p,t\np,t\n', "(the row begins after line 2)"),
    ("a.json", f'[{GOOD}, {{"prompt": "p", "answer": "t"}}]', f"record 1: {LACKS}"),
    ("a.jsonl", f'{GOOD}\n\n{{"prompt": "p", "answer": "t"}}\n', f"line 3: {LACKS}"),
    ("a.csv", "prompt,answer\np,t\n", f"line 2: {UNKNOWN}"),
    ("a.json", "[{}]", "its fields are: none"),
    ("a.json", f'[{GOOD}, {{"prompt": "p", "target": ""}}]', "record 1: target is empty"),
    ("a.jsonl", '{"prompt": "p", "target": true}\n', "line 1: target must be text, not bool (True)"),
    ("a.csv", "prompt,target\np,t\np,\n", "line 3: target is empty"),
    ("a.jsonl", '{"prompt": "\\ud800", "target": "t"}', "line 1: prompt is not valid Unicode"),
    ("a.json", GOOD, "holds an object; expected a list"),
    ("a.json", '"text"', "holds text; expected a list"),
    ("a.json", "null", "holds null; expected a list"),
    ("a.json", f"[{GOOD}, 7]", "record 1: expected an object with named fields, found int"),
    ("a.json", f"[[{GOOD}]]", "record 0: expected an object with named fields, found list"),
    ("a.jsonl", f"{GOOD}\n[1]\n", "line 2: expected an object with named fields, found list"),
    ("a.json", '[{"prompt":"p","target":"t","id":1},{"prompt":"p","target":"t","id":"1"}]', "record 1: the id '1'"),
    ("a.csv", "prompt,target,id\np,t,x\np,t,y\np,t,x\n", "line 4: the id 'x' was used before, in line 2"),
    ("a.txt", GOOD, "cannot tell the format from the name"),
    ("requests", GOOD, "cannot tell the format from the name"),
    ("a.gz", GOOD, "cannot tell the format from the name"),
    ("a.json.zip", GOOD, "cannot tell the format from the name"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES)
def test_bad_file(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read_requests(path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.json"):
        read_requests(tmp_path / "a.json")
    (tmp_path / "b.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"b\.json is a directory"):
        read_requests(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@pytest.mark.parametrize("damage", ["not gzip", "cut", "changed", "half a header"])
def test_bad_gzip(tmp_path, kind, damage):
    path = tmp_path / f"a.{kind}.gz"
    good = gzip.compress(as_text(TWO * 50, kind).replace('"id": "1", ', "").encode())
    changed = good[:-8] + bytes(4) + good[-4:]  # the checksum
    content = {
        "not gzip": as_text(TWO, kind).encode(),
        "cut": good[:-20],
        "changed": changed,
        "half a header": good[:5],
    }
    path.write_bytes(content[damage])
    with pytest.raises(ValueError) as error:
        list(read_records(path))
    assert "not a complete gzip file" in str(error.value)
    assert str(path) in str(error.value)


# --- the real files ---

REAL = [
    ("zsre/zsre_train_5k.json", 5_000),
    ("zsre/zsre_edit_5k.json", 5_000),
    ("counterfact/counterfact_train_10k.json", 10_000),
    ("counterfact/counterfact_edit_10k.json", 10_000),
    pytest.param("entityquestions/stream_train_20k.jsonl.gz", 20_000, marks=pytest.mark.slow),
    pytest.param("entityquestions/stream_edit_100k.jsonl.gz", 100_000, marks=pytest.mark.slow),
    ("wikifactdiff/wikifactdiff_en_4k.json", 4_360),
]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize(("name", "count"), REAL)
def test_real_file(name, count):
    path = DATA / name
    requests = read_requests(path)
    assert len(requests) == count
    for request in requests:
        assert request.rephrase and request.subject
        assert bool(request.locality_prompt) == bool(request.locality_target)
    for request, (_, record) in zip(requests, islice(read_records(path), 100), strict=False):
        assert request.target == record["target_new" if "counterfact" in name else "alt" if "wiki" in name else "ans"]
        assert request.prompt == record.get("src", record.get("prompt"))
        assert request.locality_prompt.endswith("?") or "zsre" not in name


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
def test_real_file_without_answers():
    with pytest.raises(ValueError, match=r"known_1000\.json, record 0: the record lacks a prompt or a target field"):
        read_requests(DATA / "known_1000.json")
