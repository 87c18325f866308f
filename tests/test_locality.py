"""Locality: the unedited model's own greedy answers are the yardstick, against transformers' generation and float64."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.evaluation import locality as locality_module
from stableedit_cpp.model.logits import past_keyword
from support.tiny import tiny_model

NAMES = ("locality_same", "locality_agreement", "locality_kl")
# The last but one shares its unrelated prompt with the first and has no answer to it; the last has no such prompt.
LOCAL = [
    {"prompt": "p", "target": "t", "locality_prompt": f"{'very ' * (n % 3)}unrelated {n}", "locality_target": "x" * n}
    for n in (1, 2, 3, 4, 5, 6)
]
LOCAL += [
    {"prompt": "q", "target": "t", "locality_prompt": LOCAL[0]["locality_prompt"]},
    {"prompt": "q", "target": "t"},
]
ROOM = 16


def means(scores: se.Scores) -> dict[str, float]:
    return {name: scores[name].mean for name in NAMES}


def own_answer(model, tokenizer, prompt: str) -> list[int]:
    """By transformers, one prompt at a time."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    return model.generate(ids, max_new_tokens=ROOM, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


def edited_copy(strength: float) -> torch.nn.Module:
    model = tiny_model("llama", torch.float64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(strength)
    return model


def test_by_the_definition(tokenizer):
    before, after = tiny_model("llama", torch.float64), edited_copy(1.3)
    first = own_answer(before, tokenizer, LOCAL[0]["locality_prompt"])
    before.generation_config.eos_token_id = first[5]  # some answers end, some are cut off
    scores = se.evaluate(after, tokenizer, LOCAL, metrics=["accuracy"], reference=before, progress=False)
    lengths = set()
    for request, record in zip(LOCAL, scores.per_request, strict=True):
        if "locality_prompt" not in request:
            assert [record[name] for name in NAMES] == [None] * 3
            continue
        prompt = tokenizer(request["locality_prompt"])["input_ids"]
        answer = own_answer(before, tokenizer, request["locality_prompt"])
        lengths.add(len(answer))
        kl, same = [], []
        for place in range(len(answer)):
            ids = torch.tensor([prompt + answer[:place]])
            with torch.no_grad():
                p, q = (model(ids).logits[0, -1].softmax(0).tolist() for model in (before, after))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
        after.generation_config.eos_token_id = before.generation_config.eos_token_id
        assert record["locality_same"] == (own_answer(after, tokenizer, request["locality_prompt"]) == answer)
        assert record["locality_agreement"] == pytest.approx(sum(same) / len(same))
        assert record["locality_kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-6)
        assert record["unedited_text"] == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(lengths) > 1 and ROOM in lengths
    assert 0 < scores["locality_same"].mean < scores["locality_agreement"].mean < 1 and scores["locality_kl"].mean > 0
    assert scores.counts()["locality_same"] == {"scored": 7, "skipped": 1}
    assert "nats   (7 requests, 1 without the prompt)" in str(scores)


class Never(torch.nn.Module):
    """Makes a token less likely than any other."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, logits):
        return logits.index_add(-1, torch.tensor([self.token]), torch.full((*logits.shape[:-1], 1), -1e3).to(logits))


def test_an_answer_that_changed_after_its_third_token(tokenizer):
    """The data set's answer, which the model never says, does not show it."""
    prompt = "unrelated"
    before, after = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    answer = own_answer(before, tokenizer, prompt)
    assert answer[3] not in answer[:3]
    after.lm_head = torch.nn.Sequential(after.lm_head, Never(answer[3]))
    assert own_answer(after, tokenizer, prompt)[:4] == [*answer[:3], own_answer(after, tokenizer, prompt)[3]]
    request = {"prompt": "p", "target": "t", "locality_prompt": prompt, "locality_target": "x"}
    how = {"metrics": ["accuracy"], "progress": False}
    scores = se.evaluate(after, tokenizer, [request], reference=before, **how)
    assert scores["locality_same"].mean == 0
    assert scores["locality_agreement"].mean == 1 - answer.count(answer[3]) / len(answer)
    assert scores["locality_kl"].mean > 0
    assert scores.specificity == se.evaluate(before, tokenizer, [request], **how).specificity


def test_against_the_editor_without_a_second_model(tokenizer):
    model = tiny_model("llama")
    config = se.StableEditConfig.one_pass(edit_modules=["model.layers.2.mlp.down_proj"], step_size=1e-2)
    editor = se.StableEdit(model, tokenizer, config)

    def local(reference) -> dict[str, float]:
        return means(se.evaluate(model, tokenizer, LOCAL, metrics=["locality"], reference=reference, progress=False))

    assert local(editor.unedited) == {"locality_same": 1.0, "locality_agreement": 1.0, "locality_kl": 0.0}
    editor.edit([{"prompt": f"fact {n}", "target": "new"} for n in range(8)], progress=False)
    edited = local(editor.unedited)
    assert edited["locality_kl"] > 1e-6
    assert edited == pytest.approx(local(tiny_model("llama")), rel=1e-5)


def test_without_a_reference_it_is_left_out(tokenizer):
    scores = se.evaluate(tiny_model("llama"), tokenizer, LOCAL, progress=False)
    assert not any(name.startswith("locality") for name in scores)


def test_each_prompt_is_answered_once_along_a_stream(tokenizer):
    reference, model = tiny_model("llama"), tiny_model("llama")
    asked, past = [], past_keyword(reference)
    reference.model.register_forward_pre_hook(  # a prompt has several tokens, a generation step one
        lambda _module, _args, kwargs: asked.append(kwargs[past] is not None), with_kwargs=True
    )
    unedited = UneditedAnswers(reference)
    how = {"metrics": ["locality"], "progress": False}
    first = se.evaluate(model, tokenizer, LOCAL[:3], reference=unedited, **how)
    generated = sum(asked)
    assert generated > 0
    asked.clear()
    assert se.evaluate(model, tokenizer, LOCAL[:3], reference=unedited, **how) == first
    assert asked and not any(asked)  # it is run over its answers, and writes none
    more = se.evaluate(model, tokenizer, LOCAL, reference=unedited, **how)
    assert sum(asked) > 0
    assert means(more) == pytest.approx(
        means(se.evaluate(model, tokenizer, LOCAL, reference=reference, **how)), rel=1e-5
    )


@pytest.mark.parametrize(("kept", "shown"), [(2**26, 1), (300 * 2 * ROOM, 3)])
def test_the_unedited_model_is_shown_for_many_batches_at_a_time(monkeypatch, tokenizer, kept, shown):
    """6 different answers take one showing, or as many as there is no more room for; and one to be written."""
    model = tiny_model("llama", torch.float64)
    config = se.StableEditConfig.one_pass(edit_modules=["model.layers.2.mlp.down_proj"], step_size=1e-2)
    editor = se.StableEdit(model, tokenizer, config)
    editor.edit([{"prompt": f"fact {n}", "target": "new"} for n in range(8)], progress=False)
    how = {"metrics": ["locality"], "max_tokens_per_forward": 1, "progress": False}  # each prompt is a batch
    expected = se.evaluate(model, tokenizer, LOCAL, reference=tiny_model("llama", torch.float64), **how)
    calls, layers = [], []

    @contextlib.contextmanager
    def unedited():
        calls.append(1)
        with editor.unedited() as same:
            yield same

    monkeypatch.setattr(locality_module, "_KEPT", kept)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: layers.append(1))
    trunk, answers = editor.make_trunk_cache(), UneditedAnswers(unedited)
    for first in (True, False):
        calls.clear(), layers.clear()
        found = se.evaluate(model, tokenizer, LOCAL, reference=answers, trunk=trunk, **how)
        assert means(found) == pytest.approx(means(expected), rel=1e-9)
        assert len(calls) == shown + first
        assert bool(layers) == first  # the second time no layer below the edited one runs, for neither model


def test_a_token_that_the_unedited_model_rules_out(tokenizer):
    class RuledOut(torch.nn.Module):
        """Gives some tokens no probability at all, as a model with a masked vocabulary does."""

        def forward(self, logits):
            return logits.index_fill(-1, torch.arange(10), -torch.inf)

    model = tiny_model("gpt2")
    model.lm_head = torch.nn.Sequential(model.lm_head, RuledOut())
    scores = se.evaluate(model, tokenizer, LOCAL, reference=model, progress=False)
    assert means(scores) == {"locality_same": 1.0, "locality_agreement": 1.0, "locality_kl": 0.0}


def test_answers_within_the_context(tokenizer):
    """An own answer is as long as the context leaves room for; a prompt that leaves none is refused."""
    model = tiny_model("gpt2", torch.float64)
    request = {"prompt": "p", "target": "t", "locality_prompt": "u" * 60}
    (record,) = se.evaluate(model, tokenizer, [request], reference=model, progress=False).per_request
    ids = torch.tensor([tokenizer("u" * 60)["input_ids"]])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 60:]
    assert record["unedited_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(
        ValueError, match=r"request 0, locality: the unrelated prompt has 65 tokens; expected 1 to .* 64"
    ):
        long = {**request, "locality_prompt": "u" * 65}
        se.evaluate(model, tokenizer, [long], reference=model, progress=False)


def test_reference_with_another_vocabulary(tokenizer):
    other = tiny_model("gpt2")
    other.resize_token_embeddings(310)
    with pytest.raises(ValueError, match="the reference model has a vocabulary of 310 tokens, the model one of 300"):
        se.evaluate(tiny_model("gpt2"), tokenizer, LOCAL, reference=other, progress=False)


def test_reference_is_left_as_found_after_an_error(tokenizer):
    closed = []

    @contextlib.contextmanager
    def shown():
        try:
            raise RuntimeError("no reference")
            yield
        finally:
            closed.append(True)

    with pytest.raises(RuntimeError, match="no reference"):
        se.evaluate(tiny_model("gpt2"), tokenizer, LOCAL, reference=shown, progress=False)
    assert closed == [True]
