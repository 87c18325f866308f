"""Anchors: unrelated prompts that are held to what the unedited model says, in the same solution as the edits."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors import anchors as anchors_module
from stableedit_cpp.editors.anchors import HELD_OUT, Anchors, unrelated_prompts
from stableedit_cpp.evaluation.locality import UneditedAnswers, locality
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.form import RAW
from stableedit_cpp.model.tokens import tokenize
from stableedit_cpp.model.top_tokens import top_tokens
from support.captures import sequences_of
from support.editors import MODULES, assert_same_bits, make, on_call, saved_on_the_way, state_of, weight_of
from support.tiny import FACTS, roomy_model, tiny_model

CLOSED = {"step_size": "auto", "centred": False, "max_passes": 6, "turn_size": 100, "past_key_weight": 0.02}
CLOSED |= {"retries_feed_statistics": False}


def anchors_of(editor, sequences, count: int = 6) -> Anchors:
    how = {"count": count, "max_tokens": 2048}
    anchors = Anchors(editor.model, editor.tokenizer, editor.modules, RAW, editor.unedited, **how)
    anchors.begin(sequences)
    return anchors


def captured_of(editor, sequences):
    return capture(editor.model, editor.modules, sequences, max_tokens=2048)


def test_there_are_prompts_of_many_kinds():
    prompts = unrelated_prompts()
    assert len(prompts) == len(set(prompts)) >= 600
    assert not all(prompt.isascii() for prompt in prompts) and unrelated_prompts() == prompts


def test_keys_and_gradients_are_those_of_the_divergence(tokenizer):
    """Against autograd through the whole model, one anchor at a time, in float64."""
    model = tiny_model("gpt2", torch.float64)
    name = "transformer.h.1.mlp.c_proj"
    sequences = sequences_of(tokenizer)[:3]
    size = model.config.vocab_size
    references = [torch.randn(len(one.answer), size, dtype=torch.float64).log_softmax(-1) for one in sequences]
    kept = [top_tokens(reference, size) for reference in references]
    modules = se.StableEdit(model, tokenizer, se.StableEditConfig(edit_modules=[name])).modules
    found = capture(model, modules, sequences, max_tokens=2048, reference=kept, weight=0.25)
    total, row = 0.0, 0
    for index in sorted(range(3), key=lambda i: -len(sequences[i])):
        kept = {}

        def hook(_module, inputs, output, kept=kept):
            output.retain_grad()
            kept["key"], kept["out"] = inputs[0], output

        handle = model.get_submodule(name).register_forward_hook(hook)
        logits = model(torch.tensor([sequences[index].ids])).logits[0, sequences[index].first :]
        handle.remove()
        p, q = references[index], logits.log_softmax(-1)
        loss = 0.25 * (p.exp() * (p - q)).sum()
        loss.backward()
        total += loss.item()
        for place in range(sequences[index].first, len(sequences[index])):
            torch.testing.assert_close(found.keys[name][row], kept["key"][0, place].detach())
            torch.testing.assert_close(found.value_gradients[name][row], kept["out"].grad[0, place])
            row += 1
    assert row == len(found.request) and found.loss == pytest.approx(total)


def test_where_nothing_has_drifted_they_pull_at_nothing(tokenizer):
    editor = make(tokenizer, tiny_model("llama"), **CLOSED)
    sequences = sequences_of(tokenizer)
    captured = captured_of(editor, sequences)
    joined = anchors_of(editor, sequences).join(captured, sequences)
    assert joined.loss == pytest.approx(captured.loss, abs=1e-3)
    for name, gradients in joined.value_gradients.items():
        own = len(captured.request)
        assert gradients[own:].abs().max() < 1e-2 * gradients[:own].abs().max()
        assert len(joined.keys[name]) == len(gradients) == len(joined.request) > own


def test_their_rows_belong_to_nobody(tokenizer):
    editor = make(tokenizer, **CLOSED)
    sequences = sequences_of(tokenizer)
    captured = captured_of(editor, sequences)
    joined = anchors_of(editor, sequences).join(captured, sequences)
    assert joined.request[len(captured.request) :].unique().tolist() == [-1]
    owned = joined.owned
    assert torch.equal(owned.request, captured.request)
    for name in captured.keys:
        assert torch.equal(owned.keys[name], captured.keys[name])


def test_statistics_and_past_keys_do_not_see_them(tokenizer):
    plain, held = make(tokenizer, **CLOSED), make(tokenizer, **CLOSED, anchors=4)
    for editor in (plain, held):
        editor.edit(FACTS, progress=False)
    assert held.normalizers["24 -> 16"].count == plain.normalizers["24 -> 16"].count
    assert held.past_keys[MODULES[0]].count == plain.past_keys[MODULES[0]].count


def test_what_is_said_elsewhere_stays_nearer_to_the_unedited_model(tokenizer, monkeypatch):
    """On prompts that are no anchors, after the same edits have been solved as often."""
    monkeypatch.setattr(anchors_module, "_EACH", 3)  # thirteen facts would have sixteen
    drift = []
    for count in (0, 40):
        editor = make(tokenizer, **CLOSED | {"take_probability": 0.99}, anchors=count)
        editor.edit(FACTS, progress=False)
        unedited = UneditedAnswers(editor.unedited)
        prompts = [tuple(tokenizer(text)["input_ids"]) for text in unrelated_prompts()[-HELD_OUT:]]
        answers = unedited.to(tokenizer, prompts)
        drift.append(float(locality(editor.model, unedited, answers, max_tokens=2048).kl.mean()))
    assert drift[1] < 0.7 * drift[0]


def test_the_same_stream_gives_the_same_bits(tokenizer, tmp_path):
    one, loaded = saved_on_the_way(tokenizer, tmp_path, **CLOSED, anchors=4)
    assert torch.equal(weight_of(one), weight_of(loaded))


def test_a_turn_can_be_done_again_and_its_requests_taken_out(tokenizer):
    turns = []
    editor = make(tokenizer, **CLOSED, anchors=4)
    editor.on_turn = turns.append
    editor.edit(FACTS, progress=False)
    again = make(tokenizer, **CLOSED, anchors=4)
    again.replay(turns[0])
    assert_same_bits(state_of(again), state_of(editor))
    first = turns[0].passes[0]
    assert first.request.min() == -1 and (first.request >= 0).any()
    share = first.contribution(first.request == 0)
    assert all(update.norm() > 0 for update in share.values())


def test_a_failure_on_the_way_leaves_everything(tokenizer, monkeypatch):
    editor = make(tokenizer, **CLOSED, anchors=4)
    editor.edit(FACTS[:3], progress=False)
    before = state_of(editor)

    def fail() -> None:
        raise RuntimeError("broken")

    on_call(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="broken"):
        editor.edit(FACTS[3:], progress=False)
    assert_same_bits(state_of(editor), before)


@pytest.mark.parametrize("count", [-1, 1.5, True])
def test_bad_numbers_are_refused(count):
    with pytest.raises(ValueError, match="anchors must be"):
        se.StableEditConfig(anchors=count)


def test_the_unedited_model_answers_only_what_is_drawn(tokenizer):
    editor = make(tokenizer, **CLOSED)
    anchors = anchors_of(editor, sequences_of(tokenizer)[:1], count=48)
    assert 32 == len(anchors.known) < len(anchors.prompts)


def test_the_nearest_are_in_every_pass(tokenizer):
    """What is asked in nearly the same words about something else is what an edit spills over to first."""
    editor = make(tokenizer, **CLOSED)
    (edited,) = tokenize(tokenizer, [("The capital city of Atlantis is", "Rome")], 2048, ["it"])
    anchors = anchors_of(editor, [edited], count=48)
    text = [tokenizer.decode(anchors.prompts[index]) for index in anchors._near]
    assert "The capital city of Thailand is" in text[:8]
    joined = anchors.join(captured_of(editor, [edited]), [edited])
    alone = capture(
        editor.model,
        editor.modules,
        [anchors.known[index][0] for index in anchors._near[:8]],
        max_tokens=2048,
        reference=[anchors.known[index][1] for index in anchors._near[:8]],
    )
    keys = joined.keys[MODULES[0]]
    assert all((keys - key).abs().sum(1).min() < 1e-4 for key in alone.keys[MODULES[0]])


@pytest.mark.parametrize("beside", [{"anchors": 16, "replays": 0}, {"anchors": 0, "replays": 16}], ids=str)
def test_a_model_that_was_changed_elsewhere_between_two_turns_is_edited_on(beside, tokenizer):
    """What was kept of its lower layers, and what the unedited model said, is no longer true."""
    model, config = roomy_model("llama"), se.StableEditConfig(max_passes=2, **beside)
    editor = se.StableEdit(model, tokenizer, config, guard=None)
    editor.edit(FACTS[:3], progress=False)
    kept = editor.companions()[0].trunk
    assert len(kept) > 0 or beside["replays"]
    editor.edit(FACTS[3:6], progress=False)
    assert len(kept) > 0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    before = weight_of(editor, editor.modules[0].name).clone()
    editor.edit(FACTS[6:9], progress=False)
    assert not torch.equal(weight_of(editor, editor.modules[0].name), before)
    assert len(kept) > 0
