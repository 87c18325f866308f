"""Scores against a loop that takes one prompt at a time and does not pad, and against values worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from stableedit_cpp import EditRequest, Scores, evaluate, generate
from stableedit_cpp.evaluation.answers import greedy_answers
from stableedit_cpp.evaluation.generation import generate_continuations
from stableedit_cpp.model.tokens import tokenize
from support.answers import Successor, readable
from support.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

ACCURACY = {"metrics": ["accuracy"], "progress": False}
METRICS = ("efficacy", "generalization", "specificity")


def next_token(model: nn.Module, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def continuation(model: nn.Module, tokenizer, text: str, length: int) -> str:
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(length):
        ids = [*ids, next_token(model, ids)]
    return tokenizer.decode(ids[start:])


def accuracy_one_by_one(model: nn.Module, tokenizer, prompt: str, target: str) -> float:
    """Definition: one prompt, one answer token at a time."""
    ids = tokenizer(prompt)["input_ids"]
    answer = tokenizer(" " + target, add_special_tokens=False)["input_ids"]
    hits = []
    for token in answer:
        hits.append(next_token(model, ids) == token)
        ids = [*ids, token]
    return sum(hits) / len(hits)


def half_right_requests(model: nn.Module, tokenizer) -> list[EditRequest]:
    """Requests of which the model knows 0 to 5 characters of the answer, with and without other prompts."""
    requests = []
    for index in range(6):
        known = []
        for kind in ("Edit", "Say", "Unrelated"):
            prompt = f"{kind} {'very ' * (index % 3)}{index}"
            known.append((prompt, continuation(model, tokenizer, prompt + " ", index) + "xy"[: 1 + index % 2]))
        (prompt, target), (rephrase, _), (other, answer) = known
        requests.append(
            EditRequest(
                prompt,
                target,
                rephrase=rephrase if index % 2 else None,
                locality_prompt=other if index > 2 else None,
                locality_target=answer if index > 2 else None,
                id=f"r{index}" if index % 2 else None,
            )
        )
    return requests


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_evaluate_equals_one_prompt_at_a_time(architecture):
    tokenizer = tiny_tokenizer(bos=architecture in ("llama", "opt"), padding_side="left")
    model = readable(tiny_model(architecture, torch.float64), tokenizer)
    requests = half_right_requests(model, tokenizer)
    scores = evaluate(model, tokenizer, requests, progress=False)
    assert [record["id"] for record in scores.per_request] == ["0", "r1", "2", "r3", "4", "r5"]
    for request, record in zip(requests, scores.per_request, strict=True):
        pairs = {
            "efficacy": (request.prompt, request.target),
            "generalization": (request.rephrase, request.target),
            "specificity": (request.locality_prompt, request.locality_target),
        }
        for metric, (prompt, target) in pairs.items():
            if prompt is None:
                assert record[metric] is None
            else:
                assert record[metric] == pytest.approx(accuracy_one_by_one(model, tokenizer, prompt, target), abs=1e-12)
    assert 0.2 < scores.efficacy < 0.9
    assert 0.2 < scores.specificity < 0.9
    # How many prompts share a forward pass does not matter.
    for budget in (1, 40):
        again = evaluate(model, tokenizer, requests, max_tokens_per_forward=budget, progress=False)
        assert again.per_request == scores.per_request


@pytest.fixture(scope="module")
def successor() -> Successor:
    return Successor(300)


# The answer begins with a space, which follows no letter, and the letter after the space is never right either.
HAND = [
    {"prompt": "p", "target": "abc", "rephrase": "q", "locality_prompt": "z", "locality_target": "xy"},  # 2/4, 1/3
    {"prompt": "p", "target": "abd", "locality_prompt": "z", "locality_target": "k", "id": "two"},  # 1/4, 0/2
    {"prompt": "p", "target": "a", "rephrase": "rr"},  # 0/2
]


def test_by_hand(successor, tokenizer):
    scores = evaluate(successor, tokenizer, HAND, **ACCURACY)
    assert scores.per_request == [
        {"id": "0", "efficacy": 2 / 4, "generalization": 2 / 4, "specificity": 1 / 3},
        {"id": "two", "efficacy": 1 / 4, "generalization": None, "specificity": 0.0},
        {"id": "2", "efficacy": 0.0, "generalization": 0.0, "specificity": None},
    ]
    assert (scores.efficacy, scores.generalization) == (0.25, 0.25)
    assert scores.specificity == pytest.approx(1 / 6)
    # sample standard deviation / root of the count
    assert scores.standard_errors == pytest.approx(
        {"efficacy": 0.25 / math.sqrt(3), "generalization": 0.25, "specificity": 1 / 6}
    )
    assert scores.to_dict() == {
        "efficacy": 0.25,
        "generalization": 0.25,
        "specificity": scores.specificity,
        "standard_errors": scores.standard_errors,
        "counts": {
            "efficacy": {"scored": 3, "skipped": 0},
            "generalization": {"scored": 2, "skipped": 1},
            "specificity": {"scored": 2, "skipped": 1},
        },
        "per_request": scores.per_request,
    }


def test_text(successor, tokenizer):
    assert str(evaluate(successor, tokenizer, HAND, **ACCURACY)).splitlines() == [
        "efficacy       0.250 ± 0.144   (3 requests)",
        "generalization 0.250 ± 0.250   (2 requests, 1 without the prompt)",
        "specificity    0.167 ± 0.167   (2 requests, 1 without the prompt)",
    ]
    assert str(evaluate(successor, tokenizer, [], **ACCURACY)).count("not scored: no request has the prompt") == 3


def test_scores_are_a_mapping(successor, tokenizer):
    scores = evaluate(successor, tokenizer, HAND, metrics=["exact_match"], progress=False)
    assert list(scores) == [*METRICS, *(f"{name}_exact_match" for name in METRICS)]
    assert scores["generalization"] == (scores.generalization, scores.standard_errors["generalization"], 2, 1)
    assert {name: score.mean for name, score in scores.items()} == scores.means()
    assert (scores.portability, scores.multi_hop, scores.persona, scores.broken) == (None, None, None, 0)
    assert repr(scores) == str(scores)
    with pytest.raises(KeyError, match="no score 'efficiency', did you mean 'efficacy'"):
        scores["efficiency"]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_standard_error(successor, tokenizer, count):
    requests = [{"prompt": "p", "target": "abcdefgh"[: index + 1]} for index in range(count)]
    scores = evaluate(successor, tokenizer, requests, **ACCURACY)
    values = [index / (index + 2) for index in range(count)]
    assert [record["efficacy"] for record in scores.per_request] == pytest.approx(values)
    assert scores.efficacy == pytest.approx(statistics.fmean(values))
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else 0.0
    assert scores.standard_errors["efficacy"] == pytest.approx(error)
    assert scores.generalization is None
    assert scores.standard_errors["generalization"] is None


@pytest.mark.parametrize("requests", [[], iter([])])
def test_no_requests(successor, tokenizer, requests):
    scores = evaluate(successor, tokenizer, requests, **ACCURACY)
    assert scores == Scores(METRICS, [])


@pytest.mark.parametrize(
    "record",
    [
        {"rephrase": ""},
        {"locality_prompt": "z"},
        {"locality_target": "xy"},
        {"locality_prompt": "", "locality_target": "xy"},
        {"locality_prompt": "z", "locality_target": ""},
    ],
)
def test_half_a_locality_pair_is_not_scored(successor, tokenizer, record):
    scores = evaluate(successor, tokenizer, [{"prompt": "p", "target": "ab", **record}], **ACCURACY)
    assert scores.generalization is None
    assert scores.specificity is None


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ([HAND[0], {"prompt": "p"}], ["request 1"]),
        ([{"prompt": "p", "target": "t", "id": "x"}] * 2, ["same id 'x'"]),
        ([HAND[0], {"prompt": "p" * 40, "target": "t", "id": "x"}], ["request 1 (x), efficacy", "41 tokens", "of 32"]),
        ([{"prompt": "p", "target": "t", "rephrase": "r" * 40}], ["request 0, generalization", "41 tokens"]),
        ([{**HAND[0], "locality_target": "t" * 40}], ["request 0, specificity", "41 tokens"]),
        (HAND[0], ["list"]),
    ],
)
def test_bad_requests(successor, tokenizer, requests, words):
    with pytest.raises(ValueError) as error:
        evaluate(successor, tokenizer, requests, **ACCURACY)
    for word in words:
        assert word in str(error.value)


def test_progress_bar(successor, tokenizer, capsys):
    evaluate(successor, tokenizer, HAND, metrics=["accuracy"], progress=True)
    assert "7/7" in capsys.readouterr().err  # prompts, not requests
    evaluate(successor, tokenizer, HAND, **ACCURACY)
    evaluate(successor, tokenizer, HAND, metrics=["accuracy"])  # stderr is no terminal here
    assert capsys.readouterr().err == ""


# --- the model is left as found ---


def state_of(model: nn.Module) -> tuple:
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        torch.is_grad_enabled(),
    )


def assert_same_state(before: tuple, after: tuple) -> None:
    assert before[:4] == after[:4]
    assert before[5:] == after[5:]
    for name, tensor in before[4].items():
        assert torch.equal(tensor, after[4][name]), name


@pytest.fixture
def half_trained() -> nn.Module:
    """Dropout on, some modules in evaluation mode, some parameters frozen."""
    model = tiny_model("gpt2").train()
    model.transformer.h[1].eval()
    model.transformer.h[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda model, tokenizer: evaluate(model, tokenizer, HAND, progress=False),
        lambda model, tokenizer: generate(model, tokenizer, ["abc"], max_new_tokens=3),
    ],
    ids=["evaluate", "generate"],
)
def test_model_is_left_as_found(half_trained, tokenizer, use):
    before = state_of(half_trained)
    results = [use(half_trained, tokenizer) for _ in range(3)]
    assert_same_state(before, state_of(half_trained))
    assert results[0] == results[1] == results[2]  # dropout is off
    assert use(half_trained.eval(), tokenizer) == results[0]


def test_model_is_left_as_found_after_an_error(half_trained, tokenizer, monkeypatch):
    before = state_of(half_trained)

    def fail(*_args, **_kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(half_trained.transformer.h[2], "forward", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        evaluate(half_trained, tokenizer, HAND, progress=False)
    with pytest.raises(RuntimeError, match="out of luck"):
        generate(half_trained, tokenizer, ["abc"])
    assert_same_state(before, state_of(half_trained))


# --- free generation ---


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("eos", [False, True])
def test_generate_is_greedy(architecture, eos):
    tokenizer = tiny_tokenizer(bos=True, eos=eos)
    model = readable(tiny_model(architecture, torch.float64), tokenizer)
    # What a saved model may bring along must not turn it into sampling, a beam search, or a text without repetitions.
    own = {"do_sample": True, "temperature": 5.0, "top_k": 3, "num_beams": 3, "max_length": 20}
    own |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(50, 70))}
    model.generation_config.update(**own, forced_eos_token_id=2)
    before = model.generation_config.to_dict()
    prompts = ["The capital of Peru is", "a", "2 + 2 ="]
    answers = generate(model, tokenizer, prompts, max_new_tokens=6)
    # The closing token of a tokenizer that has one is not part of a prompt that is to be continued.
    plain = tiny_tokenizer(bos=True)
    assert answers == [continuation(model, plain, prompt, 6) for prompt in prompts]
    torch.manual_seed(1)
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == answers
    assert model.generation_config.to_dict() == before
    asked = tokenize(plain, [(prompt, "12345") for prompt in prompts], None, prompts)  # with the space, 6 tokens
    assert [plain.decode(ids) for ids in greedy_answers(model, asked, max_tokens=100)] == answers


def test_generate_stops_at_the_end_of_sequence(tokenizer):
    model = readable(tiny_model("llama"), tokenizer)
    text = continuation(model, tokenizer, "abc", 6)
    model.generation_config.eos_token_id = tokenizer.get_vocab()[text[0]]
    assert generate(model, tokenizer, ["abc"], max_new_tokens=6) == [text[0]]


def test_generate_takes_a_text_as_one_prompt(tokenizer):
    model = tiny_model("llama")
    assert generate(model, tokenizer, "Gold is") == generate(model, tokenizer, ["Gold is"])
    assert len(generate(model, tokenizer, "Gold is")) == 1


@pytest.fixture
def silent() -> nn.Module:
    """64 positions, and nobody may run it."""

    def fail(*_):
        raise AssertionError("the model was run")

    model = tiny_model("gpt2")
    model.register_forward_pre_hook(fail)
    return model


def test_generate_within_the_context(silent, tokenizer):
    with pytest.raises(ValueError) as error:
        generate(silent, tokenizer, ["a", "b" * 60], max_new_tokens=6)
    assert str(error.value) == (
        f"the prompt {'b' * 60!r:.60}: 60 tokens with up to 6 new ones need a context of 65; the model's is 64"
    )
    model = tiny_model("gpt2", torch.float64)
    (whole,) = generate(model, tokenizer, ["b" * 60], max_new_tokens=5)
    assert whole == continuation(model, tokenizer, "b" * 60, 5)


def test_free_answers_within_the_context(tokenizer):
    """A free answer may be 8 tokens longer than the expected one, or as long as the context leaves room for."""
    model = readable(tiny_model("gpt2", torch.float64), tokenizer)
    said = continuation(model, tokenizer, "r" * 57, 8)
    requests = [{"prompt": "r" * 57, "target": "t"}, {"prompt": "p", "target": "t"}]
    scores = evaluate(model, tokenizer, requests, progress=False)
    assert scores.per_request[0]["efficacy_text"] == said
    assert scores.per_request[1]["efficacy_text"] == continuation(model, tokenizer, "p", 10)
    with pytest.raises(ValueError, match=r"^request 0, efficacy: .* 65 tokens, more than the model's context of 64"):
        evaluate(model, tokenizer, [{"prompt": "r" * 57, "target": "t" * 8}], progress=False)


def test_a_long_prompt_beside_a_long_answer(tokenizer):
    """Together in one batch the long prompt would have to go on for as long as the other one, beyond the context."""
    model = readable(tiny_model("gpt2", torch.float64), tokenizer)
    prompts, room = ["a" * 60, "b", "c" * 58], [5, 40, 2]
    together = generate_continuations(model, tokenizer, prompts, room)
    assert [text for text, _, _ in together] == [
        continuation(model, tokenizer, prompt, length) for prompt, length in zip(prompts, room, strict=True)
    ]


def test_generate_nothing(tokenizer):
    model = tiny_model("llama")
    assert generate(model, tokenizer, []) == []
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        generate(model, tokenizer, [""])
