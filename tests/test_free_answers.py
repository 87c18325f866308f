"""Scores of free answers: contains the target, and then stops."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.free_answers import is_answer, judge
from stableedit_cpp.evaluation.generation import Continuation, generate_continuations
from support.answers import follower, readable
from support.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("text", "ended", "contains", "stops"),
    [
        (" New York", True, True, True),
        (" New York", False, True, False),  # cut off, it may go on
        (" New York.", False, True, True),
        (" new  york\n and more", False, True, True),
        (" the city of New York. It", False, True, True),
        (" New York, which", False, True, False),
        (" New York City", True, True, False),
        (" New Yorkers", True, False, False),
        (" NewYork", True, False, False),
        (" Old York", True, False, False),
        (" New York City or New York!", False, True, True),
        (" New York.com", True, True, False),
        ("", True, False, False),
    ],
)
def test_judge(text, ended, contains, stops):
    assert judge(Continuation(text, ended), "New York") == (contains, stops)


def test_judge_takes_the_answer_literally():
    assert judge(Continuation(" 15 (or so).", False), "15 (or so)") == (True, True)
    assert judge(Continuation(" aab.", False), "a+b") == (False, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_prompts_at_a_time_give_what_each_gives_alone(architecture):
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model(architecture, torch.float64)
    prompts = ["The capital of Peru is", "a", "2 + 2 =", "x" * 30]
    rooms = [3, 9, 1, 5]
    together = generate_continuations(model, tokenizer, prompts, rooms)
    alone = [generate_continuations(model, tokenizer, [p], [n])[0] for p, n in zip(prompts, rooms, strict=True)]
    assert together == alone
    assert generate_continuations(model, tokenizer, prompts, rooms, max_tokens=1) == alone


@pytest.mark.parametrize(
    ("text", "ended", "exact"),
    [
        (" New York", True, True),
        (" new  york.", True, True),
        ("New York\n\n \n", False, True),  # nothing else, as far as it was let
        (" New York", False, False),  # cut off, it may go on
        (" New York\nQuestion: and", False, False),
        (" New York City", True, False),
        (" New York!", True, False),
        (" the New York", True, False),
        (" NewYork", True, False),
        (" York", True, False),
        ("", True, False),
    ],
)
def test_is_answer(text, ended, exact):
    assert is_answer(Continuation(text, ended), "New York") == exact


def test_is_answer_whatever_the_form_of_its_letters():
    assert is_answer(Continuation(" Zu\u0308rich", True), "Z\u00fcrich")
    assert is_answer(Continuation(" STRASSE", True), "Stra\u00dfe")
    assert is_answer(Continuation(" Washington, D.C.", True), "Washington, D.C.")
    assert not is_answer(Continuation(" Zurich", True), "Z\u00fcrich")


@pytest.mark.parametrize(
    ("chain", "free", "contains", "stops"),
    [
        ("q ab", 1, 1, 1),  # the answer, and the end
        ("q ab.", 1, 1, 1),
        ("q ab,xyzuvwrstklmno", 0, 1, 0),  # runs on: teacher forcing does not see it
        ("q ab\nxyz", 0, 1, 1),
        ("q xab", 0, 0, 0),
    ],
)
def test_a_model_that_runs_on_after_the_answer(tokenizer, chain, free, contains, stops):
    model = follower(tokenizer, chain)
    request = {"prompt": "q", "target": "ab", "rephrase": "xq", "portability_prompt": "yq", "portability_target": "ab"}
    scores = se.evaluate(model, tokenizer, [request], progress=False)
    assert scores.efficacy == (1 if contains else pytest.approx(2 / 3))
    for probe in ("efficacy", "generalization", "portability"):
        found = [scores[f"{probe}_{name}"].mean for name in ("free", "contains", "contains_and_stops")]
        assert found == [free, contains, stops], probe
        assert scores.per_request[0][f"{probe}_text"] == chain[1:12]


def test_an_answer_that_is_known_to_end_is_not_written_again(tokenizer, monkeypatch):
    """What a model says and where it stops is known from its top choices along the answer."""
    model = follower(tokenizer, "q ab")
    known = [{"prompt": "q", "target": "ab", "rephrase": "xq"}, {"prompt": "q", "target": "abc"}]
    how = {"metrics": ["generation"], "progress": False}
    generate, asked = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **inputs: asked.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    other = {"prompt": "q", "target": "a"}  # it goes on after that, nobody has looked where to
    records = se.evaluate(model, tokenizer, [*known, other], **how).per_request
    assert asked == [1]
    assert [record["efficacy_text"] for record in records] == [" ab"] * 3
    assert [record["efficacy_free"] for record in records] == [1, 0, 0]
    assert [text for text, *_ in generate_continuations(model, tokenizer, ["q"], [9])] == [" ab"]
    asked.clear()
    with_end = se.evaluate(model, tokenizer, [*known, other], end_of_answer=True, **how).per_request
    assert asked == [1]
    assert [record["efficacy_free"] for record in with_end] == [1, 0, 0]
    assert [record["efficacy_text"] for record in with_end] == [" ab"] * 3


def test_free_answers_are_those_of_transformers(tokenizer):
    """Whatever is asked together, as transformers' own generation gives them one prompt at a time."""
    model = readable(tiny_model("qwen2", torch.float64), tokenizer)
    requests = [
        {"prompt": "so " * (n % 4) + f"{n}", "target": "ab"[: 1 + n % 2], "rephrase": f"r{n}"} for n in range(9)
    ]
    letter = se.generate(model, tokenizer, "0", max_new_tokens=4)[0][-1]
    model.generation_config.eos_token_id = [2, tokenizer.get_vocab()[letter]]
    for request in requests[:4]:  # some that it knows, and some of these end
        request["target"] = se.generate(model, tokenizer, request["prompt"], max_new_tokens=4)[0]
    scores = se.evaluate(model, tokenizer, requests, progress=False)
    for request, record in zip(requests, scores.per_request, strict=True):
        room = len(" " + request["target"]) + 8  # a token a letter
        for probe, prompt in (("efficacy", request["prompt"]), ("generalization", request["rephrase"])):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            (row,) = model.generate(ids, max_new_tokens=room, do_sample=False, pad_token_id=0)[
                :, ids.shape[1] :
            ].tolist()
            text = tokenizer.decode(row)
            assert record[f"{probe}_text"] == text
            assert record[f"{probe}_free"] == (text.lower() == request["target"].lower() and len(row) < room)
    assert 0 < scores["efficacy_free"].mean < 1


def test_generation_scores(tokenizer):
    """A model that is asked for what it says of its own accord, and for something else."""
    model = readable(tiny_model("llama", torch.float64), tokenizer)
    said = se.generate(model, tokenizer, ["abc"], max_new_tokens=5)[0]
    model.generation_config.eos_token_id = tokenizer.get_vocab()[said[-1]]
    said = said[: said.index(said[-1]) + 1]
    requests = [
        {"prompt": "abc", "target": said, "rephrase": "abc"},
        {"prompt": "abc", "target": "zz", "locality_prompt": "l", "locality_target": "x"},
    ]
    scores = se.evaluate(model, tokenizer, requests, metrics=["generation"], progress=False)
    right, wrong = scores.per_request
    for probe in ("efficacy", "generalization"):
        assert (right[f"{probe}_free"], wrong[f"{probe}_free"]) == (1, 0 if probe == "efficacy" else None)
        assert (right[f"{probe}_contains"], right[f"{probe}_contains_and_stops"], right[f"{probe}_text"]) == (
            1,
            1,
            said,
        )
    assert (wrong["efficacy_contains"], wrong["efficacy_contains_and_stops"], wrong["efficacy_text"]) == (0, 0, said)
    assert wrong["generalization_contains"] is None
    assert not any(name.startswith("specificity_") for name in wrong)
    assert scores["efficacy_contains"].mean == 0.5
    assert scores.counts()["generalization_contains"] == {"scored": 1, "skipped": 1}
