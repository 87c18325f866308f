"""What a model makes of an answer, against a loop in float64 that takes one sequence at a time and pads nothing."""

from __future__ import annotations

import math

import pytest
import torch

from stableedit_cpp import TrunkCache
from stableedit_cpp.evaluation.answers import answer_scores, greedy_answers, read_answers
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.tokens import TokenSequence
from support.tiny import tiny_model

# Of many lengths; some feed the same tokens and ask for other answers.
SEQUENCES = [
    TokenSequence((5, 6, 7, 8), (8, 9)),
    TokenSequence((5, 6, 7), (40,)),
    TokenSequence((5, 6, 7), (41,)),
    TokenSequence((9,), (6,)),
    TokenSequence((5, 6, 7, 8), (8, 10)),
    TokenSequence((5, 6, 7, 8), (6, 7, 8, 9)),
    TokenSequence((5, 6, 7), (40,)),
    TokenSequence(tuple(range(20, 45)), tuple(range(40, 46))),
]


def by_the_definition(model: torch.nn.Module, sequence: TokenSequence) -> tuple[list[int], list[float]]:
    with torch.no_grad():
        logits = model(torch.tensor([sequence.ids])).logits[0, sequence.first :].double().tolist()
    likely = []
    for row, token in zip(logits, sequence.answer, strict=True):
        likely.append(row[token] - max(row) - math.log(math.fsum(math.exp(logit - max(row)) for logit in row)))
    return [row.index(max(row)) for row in logits], likely


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize("max_tokens", [1, 12, 1000])
def test_top_choices_and_probabilities(dtype, tolerance, max_tokens):
    model = tiny_model("llama", dtype)
    cache = TrunkCache(model, find_modules(model, ["model.layers.2.mlp.down_proj"]))
    reference = tiny_model("llama", torch.float64)
    done = []
    for trunk in (None, cache, cache):
        found = read_answers(model, SEQUENCES, max_tokens=max_tokens, trunk=trunk, on_done=done.append)
        for answer, sequence in zip(found, SEQUENCES, strict=True):
            top, likely = by_the_definition(reference, sequence)
            assert answer.top.tolist() == top
            assert answer.log_probability.tolist() == pytest.approx(likely, rel=tolerance)
            assert (answer.log_probability.dtype, answer.broken) == (torch.float64, False)
    assert sum(done) == 3 * len(SEQUENCES)


def test_scores():
    model = tiny_model("gpt2", torch.float64)
    (said,) = greedy_answers(model, [TokenSequence((5, 6, 7), (1, 1, 1))], max_tokens=99)  # to the prompt 5
    other = (*said[:2], (said[2] + 1) % 300)
    sequences = [*SEQUENCES, TokenSequence((5, *said[:2]), said), TokenSequence((5, *said[:2]), other)]
    scores = answer_scores(model, sequences, max_tokens=40)
    assert scores.accuracy.tolist()[-2:] == pytest.approx([1, 2 / 3])
    for index, sequence in enumerate(sequences):
        top, likely = by_the_definition(model, sequence)
        share = sum(a == b for a, b in zip(top, sequence.answer, strict=True)) / len(sequence.answer)
        assert float(scores.accuracy[index]) == pytest.approx(share)
        assert float(scores.probability[index]) == pytest.approx(math.exp(min(likely)), rel=1e-9)


def test_greedy_answers():
    """Each token is the top choice after the prompt and the tokens before it."""
    model = tiny_model("gpt2", torch.float64)
    found = greedy_answers(model, SEQUENCES, max_tokens=30)
    assert [len(answer) for answer in found] == [len(sequence.answer) for sequence in SEQUENCES]
    for answer, sequence in zip(found, SEQUENCES, strict=True):
        ids = list(sequence.ids[: sequence.first + 1])
        for token in answer:
            with torch.no_grad():
                assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_nothing():
    model = tiny_model("llama")
    assert read_answers(model, [], max_tokens=9) == []
    assert greedy_answers(model, [], max_tokens=9) == []
    assert answer_scores(model, [], max_tokens=9).accuracy.shape == (0,)
