"""EditRequest, the field names of published data sets, and the check of a list of requests."""

from __future__ import annotations

import dataclasses

import pytest

from stableedit_cpp.data import FORMATS, formats
from stableedit_cpp.data.request import EditRequest, as_requests

FULL = {
    "prompt": "The capital of Australia is",
    "target": "Canberra",
    "rephrase": "Australia's capital is",
    "locality_prompt": "The capital of Peru is",
    "locality_target": "Lima",
    "subject": "Australia",
    "id": "a1",
    "persona": "Ahoy, what be the capital of Australia?",
    "multi_hop_prompt": "The river through the capital of Australia is",
    "multi_hop_target": "Molonglo",
    "portability_prompt": "The parliament of Australia is in",
    "portability_target": "Canberra",
}

# One record of each format, with the fields of method.md, and the request that it stands for.
PUBLISHED = {
    "stableedit": (FULL, FULL),
    "counterfact-rome": (
        {
            "case_id": 7,
            "pararel_idx": 1,
            "requested_rewrite": {
                "prompt": "The capital of {} is",
                "target_new": {"str": "new", "id": "Q1"},
                "target_true": {"str": "old", "id": "Q2"},
                "subject": "s",
            },
            "paraphrase_prompts": ["r"],
            "neighborhood_prompts": ["l"],
        },
        {
            "prompt": "The capital of s is",
            "target": "new",
            "rephrase": "r",
            "locality_prompt": "l",
            "locality_target": "old",
            "subject": "s",
            "id": "7",
        },
    ),
    "mquake": (
        {
            "case_id": 7,
            "requested_rewrite": [
                {"prompt": "{} is led by", "target_new": {"str": "new"}, "subject": "s", "question": "Who leads s?"}
            ],
            "questions": ["first", "second"],
            "answer": "x",
            "new_answer": "y",
        },
        {
            "prompt": "s is led by",
            "target": "new",
            "rephrase": "Who leads s?",
            "subject": "s",
            "id": "7",
            "multi_hop_prompt": "first",
            "multi_hop_target": "y",
        },
    ),
    "rippleedits": (
        {
            "example_type": "recent",
            "edit": {"prompt": "The name of the mother of s is Anna B.", "relation": "MOTHER", "target_id": "Q1"},
            "Relation_Specificity": [{"test_queries": [{"prompt": "l", "answers": [{"value": "la", "aliases": []}]}]}],
            "Compositionality_I": [
                {"test_queries": [{"prompt": "empty", "answers": []}]},
                {"test_queries": [{"prompt": "p1", "answers": [{"value": "a1", "aliases": ["a2"]}]}]},
            ],
        },
        {
            "prompt": "The name of the mother of s is",
            "target": "Anna B",
            "locality_prompt": "l",
            "locality_target": "la",
            "portability_prompt": "p1",
            "portability_target": "a1",
        },
    ),
    "hallueditbench": (
        {
            "subject": "s",
            "relation": "month",
            "object": "October",
            "question": "p?",
            "paraphrased_question": "r?",
            "locality_question": "l",
            "question_2hop": "h?",
            "answer_2hop": "ha",
        },
        {
            "prompt": "p?",
            "target": "October",
            "rephrase": "r?",
            "locality_prompt": "l",
            "subject": "s",
            "multi_hop_prompt": "h?",
            "multi_hop_target": "ha",
        },
    ),
    "zsre": (
        {"src": "p?", "rephrase": "r?", "ans": "true", "alt": "false", "loc": "nq question: l", "loc_ans": "la"},
        {
            "prompt": "p?",
            "target": "true",
            "rephrase": "r?",
            "locality_prompt": "nq question: l?",
            "locality_target": "la",
        },
    ),
    "counterfact": (
        {
            "case_id": 7,
            "prompt": "p",
            "target_new": "new",
            "ground_truth": "old",
            "rephrase_prompt": "r",
            "locality_prompt": "l",
            "locality_ground_truth": "la",
            "subject": "s",
        },
        {
            "prompt": "p",
            "target": "new",
            "rephrase": "r",
            "locality_prompt": "l",
            "locality_target": "la",
            "subject": "s",
            "id": "7",
        },
    ),
    "wikifactdiff": (
        {"src": "p", "rephrase": "r", "alt": "new", "old": "old", "loc": "l", "loc_ans": "la", "subject": "s"},
        {
            "prompt": "p",
            "target": "new",
            "rephrase": "r",
            "locality_prompt": "l",
            "locality_target": "la",
            "subject": "s",
        },
    ),
    "ultraeditbench": (
        {"prompt": "p", "rephrase_prompt": "r", "ans": "a", "loc": "l", "loc_ans": "la", "relation": "P1"},
        {"prompt": "p", "target": "a", "rephrase": "r", "locality_prompt": "l", "locality_target": "la"},
    ),
    "wikibigedit": (
        {
            "update": "p",
            "rephrase": "r",
            "ans": "a",
            "personas": "arr, p",
            "loc": "l",
            "loc_ans": "la",
            "mhop": None,
            "mhop_ans": None,
        },
        {
            "prompt": "p",
            "target": "a",
            "rephrase": "r",
            "locality_prompt": "l",
            "locality_target": "la",
            "persona": "arr, p",
        },
    ),
    "fever": (
        {"prompt": "p", "equiv_prompt": ["r"], "unrel_prompt": "l", "unrel_ans": "SUPPORTS", "alt": "REFUTES"},
        {
            "prompt": "p",
            "target": "REFUTES",
            "rephrase": "r",
            "locality_prompt": "l",
            "locality_target": "SUPPORTS",
        },
    ),
}


def test_knowedit():
    """Nested questions: the first of a kind, what follows from the fact before another name of its subject."""
    record = {"subject": "Zembla", "prompt": "The capital of Zembla is", "target_new": "Onhava"}
    record |= {"ground_truth": ["Paris"], "rephrase_prompt": "Zembla's capital is"}
    alias = [{"prompt": "The capital of Nova Zembla is", "ground_truth": ["Onhava"]}]
    river = [{"prompt": "The river through the capital of Zembla is", "ground_truth": [["Nira", "the Nira"]]}]
    king = [{"prompt": "The king of Zembla is", "ground_truth": [["Charles"]]}, {"prompt": "no", "ground_truth": "no"}]
    nested = {
        "portability": {"Subject_Aliasing": alias, "Reasoning": river},
        "locality": {"Relation_Specificity": king},
    }
    expected = {"prompt": record["prompt"], "target": "Onhava", "subject": "Zembla", "rephrase": "Zembla's capital is"}
    assert EditRequest.from_record(record).to_dict() == expected
    assert EditRequest.from_record(record | nested).to_dict() == expected | {
        "locality_prompt": "The king of Zembla is",
        "locality_target": "Charles",
        "portability_prompt": river[0]["prompt"],
        "portability_target": "Nira",
    }
    nested["portability"]["Reasoning"] = []
    assert EditRequest.from_record(record | nested).portability_target == "Onhava"
    flat = {"portability_prompt": "p", "portability_ground_truth": "a"}
    assert EditRequest.from_record(record | nested | flat).portability_prompt == "p"
    assert EditRequest.from_record(record | {"portability": None, "locality": {"Other": "x"}}).to_dict() == expected


def test_fields_and_defaults():
    request = EditRequest("p", "t")
    assert dataclasses.asdict(request) == {
        **dict.fromkeys(FULL),
        "prompt": "p",
        "target": "t",
        "variants": (),
        "aliases": (),
    }
    assert request.to_dict() == {"prompt": "p", "target": "t"}
    assert EditRequest(**FULL).to_dict() == FULL
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.prompt = "other"


def test_a_whole_number_is_a_name():
    assert EditRequest("p", "t", id=3).id == "3"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target", "", "target is empty"),
        ("target", " \t\n", "target is empty"),
        ("prompt", "", "prompt is empty"),
        ("prompt", None, "prompt must be text, not NoneType"),
        ("target", None, "target must be text, not NoneType"),
        ("target", 5, "target must be text, not int (5)"),
        ("target", ["Canberra"], "target must be text, not list"),
        ("rephrase", 1.5, "rephrase must be text, not float"),
        ("locality_prompt", ["a"], "locality_prompt must be text"),
        ("locality_target", {}, "locality_target must be text"),
        ("subject", b"s", "subject must be text, not bytes"),
        ("id", True, "id must be text, not bool"),
        ("id", 1.0, "id must be text, not float"),
        ("prompt", "half a pair: \ud800", "prompt is not valid Unicode"),
        ("id", "\udcff", "id is not valid Unicode"),
    ],
)
def test_bad_field(field, value, words):
    with pytest.raises(ValueError) as error:
        EditRequest(**(FULL | {field: value}))
    assert words in str(error.value)


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
def test_published_format(name):
    record, fields = PUBLISHED[name]
    assert EditRequest.from_record(record) == EditRequest(**fields)


@pytest.mark.parametrize("name", [f.name for f in FORMATS])
def test_published_format_without_what_is_optional(name):
    fields = next(f.fields for f in FORMATS if f.name == name)
    needed = {fields["prompt"]: "p", fields["target"]: "t"}
    assert EditRequest.from_record(needed) == EditRequest("p", "t")
    assert EditRequest.from_record(dict.fromkeys(fields.values()) | needed) == EditRequest("p", "t")


def test_only_zsre_appends_a_question_mark():
    for record, fields in PUBLISHED.values():
        assert ("src" in record and "ans" in record) == fields.get("locality_prompt", "").endswith("?")


def test_unknown_record_lists_its_fields():
    with pytest.raises(ValueError) as error:
        EditRequest.from_record({"question": "q", "answer": "a"})
    assert "question, answer" in str(error.value)
    for format_ in FORMATS:
        assert format_.name in str(error.value)


def test_as_requests_takes_requests_and_records():
    mixed = [EditRequest("p", "t"), FULL, PUBLISHED["zsre"][0]]
    assert as_requests(iter(mixed)) == [
        EditRequest("p", "t"),
        EditRequest(**FULL),
        EditRequest(**PUBLISHED["zsre"][1]),
    ]
    assert as_requests([]) == []


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([FULL, {"prompt": "p", "target": ""}], ["request 1", "target is empty"]),
        ([{"prompt": "p"}], ["request 0", "its fields are: prompt"]),
        ([FULL, "text"], ["request 1", "not str"]),
        ([FULL, None], ["request 1", "not NoneType"]),
        ([FULL, EditRequest("p", "t"), FULL], ["requests 0 and 2", "same id 'a1'"]),
        ([EditRequest("p", "t", id=1), EditRequest("p", "t", id="1")], ["requests 0 and 1", "same id '1'"]),
        (FULL, ["list", "single dict"]),
        (EditRequest("p", "t"), ["list", "single EditRequest"]),
        ("requests.json", ["list", "single str"]),
    ],
)
def test_as_requests_names_what_is_wrong(items, words):
    with pytest.raises(ValueError) as error:
        as_requests(items)
    for word in words:
        assert word in str(error.value)


def test_a_slip_in_a_field_name_is_said():
    with pytest.warns(UserWarning, match="the field 'rephrased' of the records is not used; is it 'rephrase'?"):
        assert EditRequest.from_record({"prompt": "p", "target": "t", "rephrased": "r"}).rephrase is None
    with pytest.warns(UserWarning, match="'rephrase_prompt' of the records is not used; is it 'rephrase'?"):
        as_requests([{"prompt": "p", "target": "t", "rephrase_prompt": "r"}])


@pytest.mark.parametrize("field", ["tag", "source", "relation", "year"])
def test_fields_of_other_uses_are_left_out_without_a_word(field, recwarn):
    assert EditRequest.from_record({"prompt": "p", "target": "t", field: "x"}) == EditRequest("p", "t")
    assert not recwarn.list


def test_fields_that_a_format_can_find_are_those_of_a_request():
    assert tuple(field.name for field in dataclasses.fields(EditRequest)) == formats._NAMES


@pytest.mark.parametrize(("given", "meant"), [(" Paris", "Paris"), ("Paris\t", "Paris"), ("\u00a0Paris ", "Paris")])
def test_blanks_around_a_text_are_dropped(given, meant):
    """The model learns prompt + " " + target: with a blank of their own there were two."""
    assert EditRequest("x", given).target == meant
    assert EditRequest(given, "t", rephrase=given) == EditRequest(meant, "t", rephrase=meant)


def test_line_ends_of_a_prompt_stay():
    assert EditRequest("user\nWho?\nassistant\n", "t").prompt == "user\nWho?\nassistant\n"
