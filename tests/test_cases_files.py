"""Files as people have them: exports of spreadsheets, headers and values as they come, published data sets, frames."""

from __future__ import annotations

import datetime
import json
import warnings

import numpy as np
import pytest

import stableedit_cpp as se
from stableedit_cpp import EditRequest, read_requests
from stableedit_cpp.data import iter_requests, read_records
from stableedit_cpp.data.request import as_requests
from support.tiny import FACTS, tiny_model

CAPITAL = EditRequest("The capital of Zembla is", "Onhava")
MAYOR = EditRequest("The mayor of Zürich is", "Zoë Müller", rephrase="Zürich's mayor")


def lines(*rows: str) -> str:
    return "".join(f"{row}\r\n" for row in rows)


def write(path, content: str | bytes, encoding: str = "utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


@pytest.fixture
def said():
    """Warnings so far, as texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught]


# --- tables ---


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("said_first", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_table_in_any_dress(tmp_path, delimiter, said_first, encoding):
    rows = [
        ["prompt", "target", "rephrase"],
        [MAYOR.prompt, MAYOR.target, MAYOR.rephrase],
        [CAPITAL.prompt, CAPITAL.target, ""],
    ]
    text = lines(*([f"sep={delimiter}"] * said_first), *map(delimiter.join, rows))
    text = "\ufeff" + text if encoding == "utf-16-be" else text
    assert read_requests(write(tmp_path / "a.csv", text, encoding)) == [MAYOR, CAPITAL]
    assert read_requests(write(tmp_path / "a.tsv", text, encoding)) == [MAYOR, CAPITAL]


def test_the_delimiter_is_that_of_the_header(tmp_path):
    path = write(tmp_path / "a.csv", lines("prompt;target", '"a, b; ""c""";d, e', '"two\nlines";f'))
    assert read_requests(path) == [EditRequest('a, b; "c"', "d, e"), EditRequest("two\nlines", "f")]
    path = write(tmp_path / "b.csv", lines('"my; prompt",prompt,target', "x,a;b;c,d"))
    assert read_requests(path) == [EditRequest("a;b;c", "d")]


def test_empty_rows_and_columns_are_passed_over(tmp_path, said):
    rows = ["prompt,target,,", "", " , ,,", f"{CAPITAL.prompt},{CAPITAL.target},,", ",,,", "", ",,,"]
    assert read_requests(write(tmp_path / "a.csv", lines(*rows))) == [CAPITAL]
    assert [text for text in said() if "without content" in text] == [
        f"{tmp_path / 'a.csv'}: rows without content are skipped: 3"
    ]


def test_a_row_may_end_early(tmp_path):
    """Excel writes the delimiters of empty cells in some rows only."""
    path = write(tmp_path / "a.csv", lines("prompt,target,rephrase,subject", "p,t", "q,u,r"))
    assert read_requests(path) == [EditRequest("p", "t"), EditRequest("q", "u", "r")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["prompt,target,", "p,t,x"], "line 2: the cell 'x' stands in a column without a name"),
        (["prompt,target", "p,t,,x"], "line 2: more cells than the header has columns"),
        (["sep=,", "prompt,target", "p"], "line 3: fewer cells than the header has columns"),
        (["prompt,target,target", "p,t,u"], "two columns have the name 'target'"),
        (["prompt,target", "p,"], "line 2: target is empty"),
        (["prompt,target", ",t"], "line 2: prompt is empty"),
        (["Promt,Target", "p,t"], "(is 'Promt' for 'prompt'?)"),
    ],
)
def test_a_table_that_is_wrong(tmp_path, rows, words):
    with pytest.raises(ValueError) as error:
        read_requests(write(tmp_path / "a.csv", lines(*rows)))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,target\r\nZürich,Zoë\r\n".encode("cp1252"), "it seems, Windows-1252"),
        ("prompt,target\r\nZürich,Zoë\r\n".encode("mac_roman"), "is not UTF-8 text"),
        (b"prompt,target\r\n\xcf\xe0\xf0\xe8\xe6,\xd0\xe8\xec\r\n", "is not UTF-8 text"),
        ("prompt,target\r\n首都,東京\r\n".encode("shift_jis"), "is not UTF-8 text"),
        (b"PK\x03\x04" + bytes(30), "is an Excel workbook that cannot be read"),
        (b"\xd0\xcf\x11\xe0" + bytes(30), "Excel workbook of the old kind (.xls); save it in Excel"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"%PDF-1.7", "is a PDF"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.txt"])
def test_what_is_no_table_is_named(tmp_path, content, words, name):
    with pytest.raises(ValueError) as error:
        list(read_records(write(tmp_path / name, content)))
    if name == "a.csv" or content[:1] in (b"\xd0", b"v", b"<", b"%"):
        assert words in str(error.value)
    if "UTF-8" in words and name == "a.csv":
        assert "'CSV UTF-8 (Comma delimited)'" in str(error.value)


@pytest.mark.parametrize(
    "header",
    [
        "Prompt,Target,Rephrase",
        " prompt, target, rephrase ",
        "PROMPT,TARGET,Rephrase",
        '"prompt ",target,"\ufeffrephrase"',
    ],
)
def test_headers_as_people_write_them(tmp_path, header):
    path = write(tmp_path / "a.csv", lines(header, f"{MAYOR.prompt},{MAYOR.target},{MAYOR.rephrase}"))
    assert read_requests(path) == [MAYOR]


def test_names_of_published_fields_and_of_mappings_match_as_loosely(tmp_path):
    record = {"Src": "p", "ANS": "t", "Locality Prompt": "x"}
    assert as_requests([record]) == [EditRequest("p", "t")]
    path = write(tmp_path / "a.csv", lines("The Question, the answer", "p,t"))
    assert read_requests(path, format={"prompt": "the question", "target": "the answer"}) == [EditRequest("p", "t")]
    both = {"prompt": "p", "Prompt": "q", "target": "t"}
    assert as_requests([both]) == [EditRequest("p", "t")]


def test_what_is_not_used_is_said_once(tmp_path, said):
    rows = ["prompt,target,note,rephrase_prompt", "p,t,n,r", "q,u,n,r"]
    read_requests(write(tmp_path / "a.csv", lines(*rows)))
    assert [text for text in said() if "note" in text] == [f"{tmp_path / 'a.csv'}: not used: note"]
    assert any("'rephrase_prompt' of the records is not used; is it 'rephrase'?" in text for text in said())


# --- values ---


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_not_a_number_is_absent(tmp_path, name):
    records = [{"prompt": f"p{i}", "target": 'say "NaN"', "rephrase": float("nan"), "id": i} for i in range(3000)]
    text = json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records))
    found = read_requests(write(tmp_path / name, text))
    assert len(found) == 3000
    assert all(r.rephrase is None and r.target == 'say "NaN"' for r in found)
    assert [r.id for r in found] == [str(i) for i in range(3000)]


def test_where_json_with_nan_is_broken(tmp_path):
    path = write(tmp_path / "a.json", '[{"prompt": "p", "target": "t", "x": NaN,\n "y": -Infinity, "z": }]')
    with pytest.raises(ValueError, match="line 2, column 23: not valid JSON"):
        list(read_records(path))
    path = write(tmp_path / "b.json", '[{"prompt": "p", "target": NaN}]')
    with pytest.raises(ValueError, match="record 0: target is empty"):
        read_requests(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1889, "1889"),
        (2.5, "2.5"),
        (np.int64(7), "7"),
        (np.float32(0.5), "0.5"),
        (np.str_("x"), "x"),
        (datetime.date(2025, 5, 8), "2025-05-08"),
        (datetime.datetime(2025, 5, 8), "2025-05-08"),
        ({"str": "Onhava", "id": "Q1"}, "Onhava"),
        ({"value": "Onhava", "aliases": []}, "Onhava"),
    ],
)
def test_numbers_dates_and_objects_are_texts(value, text):
    request = EditRequest.from_record({"prompt": "p", "target": value, "rephrase": value, "id": np.int64(3)})
    assert (request.target, request.rephrase, request.id) == (text, text, "3")
    assert type(request.target) is str
    assert json.loads(json.dumps(request.to_dict()))["target"] == text


def test_of_a_list_of_answers_the_first_is_edited_and_any_is_right(tokenizer, said):
    record = {"prompt": "The capital of Zembla is", "target": ["Onhava", "Onhava City", ["ONH"], "Onhava"]}
    (request,) = as_requests([record])
    assert (request.target, request.aliases) == ("Onhava", ("Onhava City", "ONH"))
    assert any("the first is edited" in text for text in said())
    assert EditRequest(**request.to_dict()) == request
    # A model that says something is right if what it says is among the aliases.
    model = tiny_model("llama")
    (text,) = se.generate(model, tokenizer, [request.prompt], max_new_tokens=6)
    answers = [r | {"target": ["no such answer", text.strip() or "x"]} for r in [record]]
    scores = se.evaluate(model, tokenizer, answers, metrics=["generation"])
    alone = se.evaluate(model, tokenizer, [record | {"target": "no such answer"}], metrics=["generation"])
    assert scores["efficacy_contains"].mean >= alone["efficacy_contains"].mean
    assert scores.efficacy == alone.efficacy  # of the first


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\t", "\n", "\r\n", "\u3000", "\u202f", " \n "])
def test_blanks_and_line_ends_around_are_dropped_and_said(tmp_path, blank, said):
    given = {"prompt": f"{CAPITAL.prompt}{blank}", "target": f"{blank}{CAPITAL.target}{blank}"}
    assert as_requests([given]) == [CAPITAL]
    assert EditRequest(**given) == CAPITAL
    assert read_requests(write(tmp_path / "a.json", json.dumps([given]))) == [CAPITAL]
    texts = said()
    assert sum("2 prompts or targets are dropped" in text for text in texts) == 2
    assert sum(text.startswith("blanks around the target") for text in texts) == 1


def test_nothing_is_said_of_what_is_clean(tmp_path, said):
    as_requests([*FACTS, CAPITAL])
    read_requests(write(tmp_path / "a.csv", lines("prompt,target", "p,t")))
    assert said() == []


def test_a_rendered_chat_keeps_its_line_end():
    assert EditRequest("user\nWho?\nassistant\n", "Ann\n").prompt == "user\nWho?\nassistant\n"
    assert EditRequest("user\nWho?\nassistant\n", "Ann\n").target == "Ann"


def test_templates_are_filled_in_or_refused():
    record = {
        "prompt": "The capital of {} is",
        "target_new": "Onhava",
        "subject": "Zembla",
        "rephrase_prompt": "{}, capital?",
    }
    assert EditRequest.from_record(record) == EditRequest(
        CAPITAL.prompt, "Onhava", "Zembla, capital?", subject="Zembla"
    )
    named = {"prompt": "The capital of {subject} is", "target": "Onhava", "subject": "Zembla"}
    assert EditRequest.from_record(named).prompt == CAPITAL.prompt
    with pytest.raises(ValueError, match="is a template, and there is no subject to fill in"):
        as_requests([{"prompt": "The capital of {} is", "target": "Onhava"}])


def test_a_question_mark_is_not_doubled():
    for loc in ("who wrote faust", "who wrote faust?", "who wrote faust? "):
        assert EditRequest.from_record({"src": "p", "ans": "t", "loc": loc}).locality_prompt == "who wrote faust?"


# --- data sets with more than one request a record, or in memory ---


def test_mquake_has_several_facts_a_record(tmp_path):
    def rewrite(subject: str, target: str) -> dict:
        return {"prompt": "{} is led by", "target_new": {"str": target}, "subject": subject, "question": f"{subject}?"}

    record = {"case_id": 4, "requested_rewrite": [rewrite("Zembla", "Ann"), rewrite("Acme", "Bob")]}
    record |= {"questions": ["q1", "q2", "q3"], "new_answer": "y", "answer": "x"}
    path = write(tmp_path / "a.json", json.dumps([record, record | {"case_id": 5}]))
    first, second, *rest = read_requests(path)
    assert first == EditRequest("Zembla is led by", "Ann", "Zembla?", subject="Zembla", id="4-1")
    assert (second.id, second.multi_hop_prompt, second.multi_hop_target) == ("4-2", "q1", "y")
    assert [request.id for request in rest] == ["5-1", "5-2"]
    assert len(as_requests([record])) == 2
    with pytest.raises(ValueError, match="the record holds 2 requests"):
        EditRequest.from_record(record)


@pytest.mark.parametrize(
    ("sentence", "prompt", "target"),
    [
        ("The name of the author of What is Art is Leo T.", "The name of the author of What is Art is", "Leo T"),
        ("Life is followed by Death is Near.", "Life is followed by", "Death is Near"),
        ("The names of the siblings of s are Ann.", "The names of the siblings of s are", "Ann"),
        ("Two follows One.", "Two follows", "One"),
    ],
)
def test_the_sentences_of_rippleedits_are_cut_before_the_answer(sentence, prompt, target):
    said = {"prompt": "alias", "answers": [{"value": target, "aliases": []}]}
    record = {"edit": {"prompt": sentence}, "Subject_Aliasing": [{"test_queries": [said]}]}
    request = EditRequest.from_record(record)
    assert (request.prompt, request.target) == (prompt, target)
    if "is Near" not in sentence:
        assert EditRequest.from_record({"edit": {"prompt": sentence}}).prompt == prompt


def test_nested_questions_of_easyedit():
    record = {"prompt": "p", "target_new": "t", "rephrase": "r"}
    record["locality"] = {"neighborhood": {"prompt": ["l1", "l2"], "ground_truth": ["a1", "a2"]}}
    record["portability"] = {"one_hop": {"prompt": "q", "ground_truth": "b"}}
    expected = EditRequest("p", "t", "r", "l1", "a1", portability_prompt="q", portability_target="b")
    assert EditRequest.from_record(record) == expected


def test_rows_of_a_dataframe():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["p", "q"], "target": [1889, 4], "rephrase": [None, "r"], "id": [1, None]})
    expected = [EditRequest("p", "1889", id="1"), EditRequest("q", "4", "r")]
    assert as_requests(frame) == expected
    assert read_requests(frame) == expected
    assert list(iter_requests(frame, 1)) == expected[:1]
    with pytest.raises(ValueError, match="the DataFrame, row 0: the record lacks"):
        read_requests(frame.rename(columns={"target": "answer"}))


def test_a_workbook_also_under_a_wrong_name(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.create_sheet("requests")
    for row in [["Prompt", "Target ", None], [CAPITAL.prompt, CAPITAL.target], [None, " "], ["Signed in", 1889]]:
        book["requests"].append(row)
    book.save(tmp_path / "a.xlsx")
    expected = [CAPITAL, EditRequest("Signed in", "1889")]
    assert read_requests(tmp_path / "a.xlsx") == expected
    assert read_requests((tmp_path / "a.xlsx").rename(tmp_path / "b.csv")) == expected


def test_parquet(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"prompt": ["p", "q"], "target": [["a", "b"], ["c"]], "rephrase": [float("nan"), "r"]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_requests(tmp_path / "a.parquet") == [EditRequest("p", "a", aliases=["b"]), EditRequest("q", "c", "r")]
    with pytest.raises(ValueError, match="no complete Parquet file"):
        read_requests(write(tmp_path / "b.parquet", b"PAR1" + bytes(10)))
