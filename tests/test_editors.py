"""The turn loop: deterministic, and honest about what it did (how it ends early: test_interrupted_turns.py)."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.editors import turn as turns
from stableedit_cpp.evaluation.answers import AnswerScores
from stableedit_cpp.model.tokens import TokenSequence
from support.captures import flags_of, sequences_of
from support.editors import MODULES, TURN, assert_same_bits, make, state_of, weight_of
from support.tiny import FACTS, tiny_model, tiny_tokenizer


class TestTurns:
    def test_last_incomplete_turn_is_edited(self, tokenizer):
        editor = make(tokenizer)
        report = editor.edit(FACTS[:10])
        assert [turn.requests for turn in report.turns] == [5, 5]
        before = weight_of(editor).clone()
        report = editor.edit(FACTS[10:])
        assert [turn.requests for turn in report.turns] == [3]
        assert report.edits == 3
        assert not torch.equal(weight_of(editor), before)

    def test_one_call_or_several(self, tokenizer):
        """The statistics and the masters live on between calls."""
        model = tiny_model("llama", torch.bfloat16)
        whole, parts = make(tokenizer, model), make(tokenizer, tiny_model("llama", torch.bfloat16))
        whole.edit(FACTS)
        for begin in (0, 5, 10):
            parts.edit(iter(FACTS[begin : begin + 5]))
        assert_same_bits(state_of(whole), state_of(parts))

    @pytest.mark.parametrize("count", [0, 1])
    def test_few_requests(self, count, tokenizer):
        editor = make(tokenizer)
        before = state_of(editor)
        report = editor.edit(FACTS[:count])
        assert report.edits == len(report.turns) == count
        assert torch.equal(weight_of(editor), before[f"model {MODULES[0]}.weight"]) == (count == 0)

    def test_single_answer_token(self, tokenizer, monkeypatch):
        """One row in all is its own mean: nothing to learn from yet, and nothing breaks."""
        editor = make(tokenizer, edit_modules=MODULES[:1])
        whole = editor.tokenize
        monkeypatch.setattr(editor, "tokenize", lambda requests: [first_token(one) for one in whole(requests)])
        before = weight_of(editor).clone()
        assert editor.edit(FACTS[:1]).turns[0].answer_tokens == 1
        assert torch.equal(weight_of(editor), before)
        editor.edit(FACTS[1:3])
        assert not torch.equal(weight_of(editor), before)
        assert all(torch.isfinite(tensor).all() for tensor in state_of(editor).values())

    def test_warm_up_stays_in_the_model_and_is_diagonal(self, tokenizer):
        editor = make(tokenizer)
        before = weight_of(editor).clone()
        warm_up = editor.warm_up(FACTS)
        assert [set(turn.whitening.values()) for turn in warm_up.turns] == [{"diagonal"}] * 3
        assert not torch.equal(weight_of(editor), before)
        assert editor.normalizers["24 -> 16"].count == 3 * sum(turn.answer_tokens for turn in warm_up.turns)
        report = editor.edit(FACTS)
        assert [set(turn.whitening.values()) for turn in report.turns] == [{"full"}] * 3

    def test_modes_differ(self, tokenizer):
        results = []
        for whitening in ("full", "diagonal", "none"):
            editor = make(tokenizer, whitening=whitening, warm_up_whitening="none")
            editor.warm_up(FACTS)
            assert {mode for turn in editor.edit(FACTS).turns for mode in turn.whitening.values()} == {whitening}
            results.append(weight_of(editor))
        assert not torch.equal(results[0], results[1])
        assert not torch.equal(results[1], results[2])

    def test_ultraedit(self, tokenizer):
        for exact in (True, False):
            editor = make(tokenizer, editor=se.UltraEdit, config=se.UltraEditConfig, unbiased_batches=not exact)
            before = weight_of(editor).clone()
            reports = editor.warm_up(FACTS[:6]), editor.edit(FACTS)
            assert [report.editor for report in reports] == ["ultraedit"] * 2
            assert {mode for turn in reports[1].turns for mode in turn.whitening.values()} == {"diagonal"}
            assert not torch.equal(weight_of(editor), before)

    def test_model_is_left_as_found(self, tokenizer):
        model = tiny_model("llama").train()
        model.model.layers[1].eval()
        model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
        flags = flags_of(model)
        make(tokenizer, model, max_passes=2).edit(FACTS, progress=True)
        assert flags_of(model) == flags
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
    def test_where_gradients_are_switched_off(self, context, tokenizer):
        """Also from one call to the next, inside and outside."""
        inside, outside = make(tokenizer), make(tokenizer)
        with context():
            inside.edit(FACTS[:5])
        inside.edit(FACTS[5:])
        outside.edit(FACTS)
        assert_same_bits(state_of(inside), state_of(outside))


def outcomes_are(monkeypatch, editor, accuracy, likely=None) -> list[list]:
    """Captures and looks show these shares of right answer tokens, by request, and these least likely ones: the first
    of the unedited model, then one for each weights that were not there before. Returns what captures were asked for.
    """
    states, captured, real = [], [], turns.capture
    sequences = editor.tokenize(as_requests(FACTS[:5]))

    def now() -> tuple[torch.Tensor, torch.Tensor]:
        weight = editor.modules[0].weight.detach().clone()
        number = next((n for n, known in enumerate(states) if torch.equal(known, weight)), len(states))
        states.extend([weight] if number == len(states) else [])
        probability = 1.0 if likely is None else likely[number]
        return torch.tensor(accuracy[number], dtype=torch.float64), torch.full((5,), probability, dtype=torch.float64)

    def capture(model, modules, asked, **how):
        captured.append(list(asked))
        shown, probability = now()
        these = [sequences.index(sequence) for sequence in asked]
        found = real(model, modules, asked, **how)
        return dataclasses.replace(found, correct=shown[these], probability=probability[these])

    monkeypatch.setattr(turns, "capture", capture)
    monkeypatch.setattr(turns, "answer_scores", lambda *_args, **_how: AnswerScores(*now()))
    return captured


class TestPasses:
    def test_only_what_has_not_taken_is_solved_again(self, monkeypatch, tokenizer):
        """Requests 1 and 3 of the turn hold after the first pass, as the capture for the second shows, all of them
        after the second."""
        editor = make(tokenizer, max_passes=5)
        captured = outcomes_are(monkeypatch, editor, [[0.0] * 5, [0.5, 1.0, 0.0, 1.0, 0.9], [1.0] * 5])
        report = editor.edit(FACTS[:5])
        all_five = sequences_of(tokenizer, FACTS[:5])
        assert captured == [all_five, all_five, [all_five[0], all_five[2], all_five[4]]]
        assert (report.turns[0].passes, report.turns[0].taken) == (2, [2, 5])
        assert report.turns[0].answer_tokens == sum(len(sequence.answer) for sequence in all_five)

    def test_a_turn_ends_at_its_best_pass(self, monkeypatch, tokenizer):
        """Three of five hold after the second pass, fewer after those that follow: they are not in the model, nor in
        what a follower hears of. That two were undone by the third shows only in the last look."""
        heard, norms = [], []
        editor, short = make(tokenizer, max_passes=4), make(tokenizer, max_passes=2)
        editor.on_turn = heard.append
        for one in (editor, short):
            accuracy = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
            outcomes_are(monkeypatch, one, accuracy)
            report = one.edit(FACTS[:5])
            (turn,) = report.turns
            assert turn.passes == 2 and [failure.index for failure in turn.failed] == [3, 4]
            assert turn.taken == ([1, 3, 3, 1] if one is editor else [1, 3])
            norms.append(turn.update_norms)
        assert norms[0] == norms[1]  # those of the pass that is in the weights
        assert_same_bits(state_of(editor), state_of(short))
        again = make(tokenizer, max_passes=4)
        again.replay(heard[0])
        assert_same_bits(state_of(again), state_of(editor))

    def test_of_two_passes_with_which_as_many_take_the_likelier_answers_stay(self, monkeypatch, tokenizer):
        editor = make(tokenizer, max_passes=3)
        outcomes_are(monkeypatch, editor, [[0.0] * 5] * 4, [0.1, 0.2, 0.3, 0.1])
        assert editor.edit(FACTS[:5]).turns[0].passes == 2

    def test_one_pass(self, tokenizer):
        assert [turn.passes for turn in make(tokenizer).edit(FACTS).turns] == [1, 1, 1]


class TestStatistics:
    def test_pooled_by_shape_or_apart(self, tokenizer):
        mixed = [*MODULES, "model.layers.2.mlp.up_proj"]
        shared = make(tokenizer, edit_modules=mixed)
        apart = make(tokenizer, edit_modules=mixed, statistics="per_module")
        assert list(shared.normalizers) == ["24 -> 16", "16 -> 24"]
        assert set(apart.normalizers) == set(mixed)
        tokens = sum(turn.answer_tokens for turn in shared.edit(FACTS).turns)
        apart.edit(FACTS)
        assert shared.normalizers["24 -> 16"].count == 3 * tokens
        assert shared.normalizers["16 -> 24"].count == tokens
        assert all(normalizer.count == tokens for normalizer in apart.normalizers.values())
        assert not torch.allclose(weight_of(shared), weight_of(apart))

    def test_one_module_is_the_same_either_way(self, tokenizer):
        shared, apart = (
            make(tokenizer, edit_modules=MODULES[:1], statistics=statistics) for statistics in ("shared", "per_module")
        )
        shared.edit(FACTS)
        apart.edit(FACTS)
        assert torch.equal(weight_of(shared), weight_of(apart))

    def test_the_turn_is_folded_in_before_it_is_normalised(self, tokenizer):
        """Otherwise the first turn would meet empty statistics."""
        editor = make(tokenizer)
        report = editor.edit(FACTS[:TURN])
        normalizer = editor.normalizers["24 -> 16"]
        assert normalizer.count == 3 * report.turns[0].answer_tokens > 17
        assert report.turns[0].whitening == {"24 -> 16": "full"}


class TestSameInputSameBits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_two_runs(self, dtype, tokenizer):
        states = []
        for _ in range(2):
            editor = make(tokenizer, tiny_model("llama", dtype), max_passes=2)
            editor.warm_up(FACTS)
            editor.edit(FACTS)
            states.append(state_of(editor))
        assert_same_bits(*states)

    def test_forms_of_requests(self, tokenizer):
        """Dicts, EditRequests, records of a published data set."""
        zsre = [{"src": fact["prompt"], "ans": fact["target"]} for fact in FACTS]
        states = []
        for requests in (FACTS, [se.EditRequest(**fact) for fact in FACTS], zsre, [*zsre[:3], *FACTS[3:]]):
            editor = make(tokenizer)
            editor.edit(requests)
            states.append(state_of(editor))
        for state in states[1:]:
            assert_same_bits(states[0], state)

    def test_bar_train_mode_and_size_of_the_forward_pass_change_nothing(self, tokenizer):
        plain, other = make(tokenizer), make(tokenizer, tiny_model("llama").train())
        plain.edit(FACTS, progress=False)
        other.edit(FACTS, progress=True)
        assert_same_bits(state_of(plain), state_of(other))
        small = make(tokenizer, max_tokens_per_forward=60)
        small.edit(FACTS)
        assert torch.allclose(weight_of(small), weight_of(plain), rtol=1e-4, atol=1e-5)


BAD_REQUESTS = {
    "empty target": ({"prompt": "x", "target": ""}, "request 12: target is empty"),
    "blank target": ({"prompt": "x", "target": "  "}, "request 12: target is empty"),
    "empty prompt": ({"prompt": "", "target": "x"}, "request 12: prompt is empty"),
    "no target": ({"prompt": "x"}, "request 12: the record lacks a prompt or a target field; its fields are: prompt"),
    "target is no text": ({"prompt": "x", "target": True}, "request 12: target must be text, not bool"),
    "too long": (
        {"prompt": "p" * 60, "target": "t" * 10, "id": "long"},
        r"request 12 \(long\): prompt and target have 70 tokens, more than the model's context of 64",
    ),
    "same id": ({"prompt": "x", "target": "y", "id": "first"}, "requests 0 and 12 have the same id 'first'"),
    "not a record": (("x", "y"), "request 12 must be an EditRequest or a dict, not tuple"),
    "nothing": (None, "request 12 must be an EditRequest or a dict, not NoneType"),
}


class TestBadRequests:
    @pytest.mark.parametrize("bad, message", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
    @pytest.mark.parametrize("call", ["edit", "warm_up"])
    def test_refused_before_the_first_turn(self, call, bad, message, tokenizer):
        """The last of 13 requests is wrong: not one turn is edited."""
        editor = make(tokenizer)
        editor.edit(FACTS[:2])
        before = state_of(editor)
        requests = [FACTS[0] | {"id": "first"}, *FACTS[1:12], bad]
        with pytest.raises(ValueError, match=message):
            getattr(editor, call)(requests)
        assert_same_bits(state_of(editor), before)

    @pytest.mark.parametrize("requests", [FACTS[0], se.EditRequest("x", "y"), "x"], ids=["dict", "request", "text"])
    def test_a_single_request_instead_of_a_list(self, requests, tokenizer):
        with pytest.raises(ValueError, match="requests must be a list of EditRequest or dict, not a single"):
            make(tokenizer).edit(requests)


class TestWeightsBetweenCalls:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("how", ["in place", "new data", "new parameter"])
    def test_changed_by_the_caller(self, how, dtype, tokenizer):
        """What the caller puts there is edited, not an old master."""
        editor = make(tokenizer, tiny_model("llama", dtype))
        editor.edit(FACTS[:5])
        module = editor.model.get_submodule(MODULES[0])
        if how == "in place":
            module.weight.data.zero_()
        elif how == "new data":
            module.weight.data = torch.zeros_like(module.weight)
        else:
            module.weight = torch.nn.Parameter(torch.zeros_like(module.weight))
        turn = editor.edit(FACTS[5:10]).turns[0]
        assert weight_of(editor).float().norm().item() == pytest.approx(turn.update_norms[MODULES[0]], rel=0.01)

    def test_another_dtype(self, tokenizer):
        editor = make(tokenizer, tiny_model("llama", torch.bfloat16))
        editor.edit(FACTS[:5])
        editor.model.float()
        before = weight_of(editor).clone()
        turn = editor.edit(FACTS[5:10]).turns[0]
        assert weight_of(editor).dtype == torch.float32
        change = (weight_of(editor) - before).norm().item()
        assert change == pytest.approx(turn.update_norms[MODULES[0]], rel=1e-4)

    def test_small_updates_add_up_in_bfloat16(self, tokenizer):
        """Steps that a bf16 weight would swallow reach the master: the sum is that of a float32 model."""
        half = make(tokenizer, tiny_model("llama", torch.bfloat16), step_size=1e-5)
        full = make(tokenizer, tiny_model("llama", torch.bfloat16).float(), step_size=1e-5)
        start = weight_of(full).clone()
        for editor in (half, full):
            for _ in range(10):
                editor.edit(FACTS)
        expected = weight_of(full) - start
        moved = half.weights[MODULES[0]].master - start
        assert (moved - expected).norm() < 0.1 * expected.norm()
        assert expected.abs().max() < 0.01 * start.abs().mean()


class TestReport:
    def test_consistent(self, tokenizer):
        editor = make(tokenizer, max_tokens_per_forward=100)
        before = weight_of(editor).clone()
        report = editor.edit(FACTS)
        assert report.editor == "stableedit"
        assert report.edits == len(FACTS)
        tokens = [len(sequence.answer) for sequence in sequences_of(tokenizer)]
        assert [turn.answer_tokens for turn in report.turns] == [sum(tokens[:5]), sum(tokens[5:10]), sum(tokens[10:])]
        parts = report.seconds_by_part()
        assert set(parts) == {"capture", "mathematics", "apply"}
        assert all(seconds > 0 for seconds in parts.values())
        assert sum(parts.values()) <= report.seconds
        assert report.edits_per_second == pytest.approx(report.edits / report.seconds)
        for turn in report.turns:
            assert 4 < turn.loss_before < 8
            assert 0 <= turn.efficacy_before <= 1
            assert turn.efficacy_after is None
            assert list(turn.update_norms) == MODULES
        assert (weight_of(editor) - before).norm() <= sum(turn.update_norms[MODULES[0]] for turn in report.turns) * 1.01

    def test_update_norm_is_that_of_the_weight_change(self, tokenizer):
        editor = make(tokenizer)
        before = {name: weight_of(editor, name).clone() for name in MODULES}
        (turn,) = editor.edit(FACTS[:5]).turns
        for name, norm in turn.update_norms.items():
            assert (weight_of(editor, name) - before[name]).norm().item() == pytest.approx(norm, rel=1e-4)

    def test_json(self, tokenizer):
        report = make(tokenizer).edit(FACTS)
        document = json.loads(json.dumps(report.to_dict()))
        assert document["edits"] == 13
        assert document["turns"][2]["requests"] == 3
        assert document["turns"][0]["whitening"] == {"24 -> 16": "full"}
        assert document["seconds_by_part"].keys() == {"capture", "mathematics", "apply"}

    def test_progress_bar(self, capfd, tokenizer):
        editor = make(tokenizer)
        editor.warm_up(FACTS[:5], progress=True)
        report = editor.edit(FACTS, progress=True)
        shown = capfd.readouterr().err
        assert "Warm-up: 100%" in shown and "5/5" in shown
        assert "Editing: 100%" in shown and "13/13" in shown
        assert "edit/s" in shown
        assert "efficacy=0." in shown
        expected = se.evaluate(editor.model, tokenizer, FACTS[10:]).efficacy
        assert report.turns[-1].efficacy_after == pytest.approx(expected)

    @pytest.mark.parametrize("progress", [False, None])
    def test_no_bar(self, progress, capfd, tokenizer):
        """None shows it on a terminal only."""
        make(tokenizer).edit(FACTS, progress=progress)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("settings", [{"bos": True}, {"eos": True}, {"padding_side": "left"}], ids=str)
def test_any_tokenizer(settings):
    """Edits take with every kind of tokenizer."""
    editor = make(tiny_tokenizer(**settings), max_passes=8)
    before = se.evaluate(editor.model, editor.tokenizer, FACTS).efficacy
    assert editor.edit(FACTS).edits == 13
    assert se.evaluate(editor.model, editor.tokenizer, FACTS).efficacy > before + 0.05


def test_default_config(tokenizer):
    """Without a config the editors choose the modules themselves."""
    for editor_class, name in (
        (se.StableEdit, "transformer.h.2.attn.c_proj"),
        (se.UltraEdit, "transformer.h.2.mlp.c_proj"),
    ):
        model = tiny_model("gpt2")
        before = model.get_submodule(name).weight.detach().clone()
        editor = editor_class(model, tokenizer)
        assert [module.name for module in editor.modules] == [name]
        editor.edit(FACTS)
        assert not torch.equal(model.get_submodule(name).weight, before)


def first_token(sequence: TokenSequence) -> TokenSequence:
    """A prompt with the first token of its answer."""
    return TokenSequence(sequence.ids[: len(sequence.ids) - len(sequence.answer) + 1], sequence.answer[:1])
