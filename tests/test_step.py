"""``step_size="auto"``: the step that the loss and its gradients ask for, whatever the scale of anything."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import LifelongNormalizer, PolyakStep, WhiteningOptions
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.editors.registry import named_editor
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.model.capture import capture
from support.captures import sequences_of
from support.editors import MODULES, assert_same_bits, make, on_call, state_of, weight_of
from support.tiny import FACTS, roomy_model, tiny_model


def fail() -> None:
    raise RuntimeError("broken")


WHITENINGS = ["full", "diagonal", "none"]


def captured_of(editor):
    sequences = sequences_of(editor.tokenizer)
    return capture(editor.model, editor.modules, sequences, micro_batch=10, max_tokens=512)


def solved(editor, captured):
    editor.solver.observe("edit", 0, captured)
    return editor.solver.solve(captured)


def test_the_step_is_the_loss_over_the_decrease_that_the_update_promises(tokenizer):
    """Against the definition, in float64: alpha = 1.5 L / s, s = - sum over modules and rows of <g, U h>."""
    auto, unit = (make(tokenizer, tiny_model("llama", torch.float64), step_size=size) for size in ("auto", 1.0))
    captured = captured_of(auto)
    chosen, whole = solved(auto, captured), solved(unit, captured)
    loss = sum(  # the mean over the answer tokens of each micro-batch, summed over micro-batches
        float((captured.losses[r] * answers[r]).sum() / answers[r].sum())
        for answers in [torch.bincount(captured.request).double()]
        for r in (torch.unique(captured.request[captured.micro_batch == m]) for m in captured.micro_batch.unique())
    )
    decrease = -sum(
        float(((captured.keys[name] @ update.dense().T) * captured.value_gradients[name]).sum())
        for name, update in whole.updates.items()
    )
    assert captured.loss == pytest.approx(loss, rel=1e-12)
    assert chosen.step_size == pytest.approx(loss / decrease, rel=1e-9)
    for name, update in whole.updates.items():
        torch.testing.assert_close(chosen.updates[name].dense(), chosen.step_size * update.dense())


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e5])
def test_the_scale_of_the_loss_changes_nothing(tokenizer, whitening, factor):
    model = tiny_model("llama", torch.float64)
    config = {"step_size": "auto", "whitening": whitening}
    captured = captured_of(make(tokenizer, model, **config))
    scaled = dataclasses.replace(
        captured,
        loss=captured.loss * factor,
        value_gradients={name: g * factor for name, g in captured.value_gradients.items()},
    )
    plain = solved(make(tokenizer, model, **config), captured)
    other = solved(make(tokenizer, model, **config), scaled)
    for name, update in plain.updates.items():
        torch.testing.assert_close(other.updates[name].dense(), update.dense(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("factor", [1 / 64, 16.0])
def test_the_scale_of_the_residual_stream_changes_nothing(tokenizer, whitening, factor):
    """Embeddings and all that is added to the stream times a factor: the norms take it out again, so the model is the
    same function, and so must the edited one be."""

    def edited(scale: float) -> torch.Tensor:
        model = tiny_model("llama", torch.float64)
        with torch.no_grad():
            for norm in (m for name, m in model.named_modules() if name.endswith("norm")):
                norm.variance_epsilon = 1e-18
            model.model.embed_tokens.weight *= scale
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= scale
                layer.mlp.down_proj.weight *= scale
        editor = make(tokenizer, model, step_size="auto", whitening=whitening, turn_size=100)
        editor.edit(FACTS, progress=False)
        with torch.no_grad():
            return model(torch.tensor([sequences_of(tokenizer)[0].ids])).logits

    torch.testing.assert_close(edited(factor), edited(1.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("facts", [FACTS[:1], FACTS[:2], FACTS])
def test_uncentred_every_pass_lowers_the_loss_to_first_order(tokenizer, whitening, facts):
    """One fact, too, whose rows are their own mean; against autograd, by moving a little along the update."""
    model = tiny_model("llama", torch.float64)
    editor = make(tokenizer, model, step_size="auto", centred=False, whitening=whitening)
    sequences = sequences_of(tokenizer, facts)

    def loss() -> float:
        return capture(model, editor.modules, sequences, micro_batch=10, max_tokens=512).loss

    captured = capture(model, editor.modules, sequences, micro_batch=10, max_tokens=512)
    solution = solved(editor, captured)
    assert solution.step_size > 0
    share, before = 1e-6, loss()
    with torch.no_grad():
        for name, update in solution.updates.items():
            model.get_submodule(name).weight += share * update.dense()
    # A whole step would remove the whole loss to first order, and this one a share of that; not quite,
    # because the update acts at the prompts' positions, too, whose rows were not asked for.
    assert before - loss() == pytest.approx(share * before, rel=0.1)


def test_uncentred_value_gradients_are_whitened_by_their_second_moment():
    gradients = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3.0
    keys = torch.randn(400, 4, dtype=torch.float64)
    for mode in ("full", "diagonal"):
        normalizer = LifelongNormalizer(4, 5, whitening=WhiteningOptions(mode=mode, floor=0.0, centred=False))
        normalizer.observe(keys, gradients)
        white = normalizer.normalize_value_gradients(gradients)
        if mode == "full":
            psi, m = torch.cov(gradients.T, correction=0) * 400, gradients.mean(0)
            values, vectors = torch.linalg.eigh(psi / (400 - 5 - 1) + torch.outer(m, m))
            expected = gradients @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
        else:
            expected = gradients / gradients.square().mean(0).sqrt()
        torch.testing.assert_close(white, expected)
        again = LifelongNormalizer.from_state_dict(normalizer.state_dict())
        assert torch.equal(again.normalize_value_gradients(gradients), white)


def test_a_second_step_is_bounded_by_the_first(tokenizer):
    editor = make(tokenizer, step_size="auto", max_passes=4)
    editor.edit(FACTS, progress=False)
    steps = editor.solver.step.recent
    assert 0 < len(steps) <= editor.solver.step.window
    assert steps[1] <= editor.solver.step.growth * steps[0] * (1 + 1e-12)


def test_the_loss_falls(tokenizer):
    editor = make(tokenizer, step_size="auto", turn_size=100)
    first = editor.edit(FACTS, progress=False).turns[0].loss_before
    assert editor.edit(FACTS, progress=False).turns[0].loss_before < first


def test_what_fails_takes_its_steps_back(tokenizer, monkeypatch):
    editor = make(tokenizer, step_size="auto", max_passes=2)
    editor.edit(FACTS[:5], progress=False)
    before, steps = state_of(editor), editor.solver.step.recent
    on_call(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="broken"):
        editor.edit(FACTS[5:], progress=False)
    assert editor.solver.step.recent == steps
    assert_same_bits(state_of(editor), before)


def test_a_saved_editor_goes_on_with_the_same_steps(tokenizer, tmp_path):
    one, other = (make(tokenizer, step_size="auto", max_passes=2) for _ in range(2))
    one.edit(FACTS[:5], progress=False)
    one.save(tmp_path / "saved")
    loaded = se.StableEdit.load(other.model, tokenizer, tmp_path / "saved")
    assert loaded.solver.step.recent == one.solver.step.recent
    for editor in (one, loaded):
        editor.edit(FACTS[5:], progress=False)
    assert torch.equal(weight_of(one), weight_of(loaded))


def test_a_turn_that_is_done_again_leaves_the_same_steps(tokenizer):
    turns = []
    editor = make(tokenizer, step_size="auto", max_passes=2)
    editor.on_turn = turns.append
    editor.edit(FACTS, progress=False)
    again = make(tokenizer, step_size="auto", max_passes=2)
    for turn in turns:
        again.replay(turn)
    assert again.solver.step.recent == editor.solver.step.recent
    assert_same_bits(state_of(again), state_of(editor))


def test_modules_at_which_the_gradient_vanishes_are_named(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        for name in MODULES:  # what these write no later layer and no logit reads
            model.get_submodule(name).weight.zero_()
        model.lm_head.weight.zero_()
    editor = make(tokenizer, model, step_size="auto", whitening="none")
    editor.check(FACTS)
    before = [weight_of(editor, name).clone() for name in MODULES]
    with pytest.raises(ValueError, match=r"edit_modules .*layers\.0.*vanish"):
        editor.edit(FACTS[:5], progress=False)
    assert all(torch.equal(weight_of(editor, name), weight) for name, weight in zip(MODULES, before, strict=True))
    assert editor.normalizers["24 -> 16"].count == 0


def test_a_number_keeps_no_steps(tokenizer):
    editor = make(tokenizer)
    editor.edit(FACTS[:5], progress=False)
    assert editor.solver.step is None
    assert "step" not in editor.state_dict()


class TestANumberInThePlaceOfTheDefault:
    """``StableEditConfig(step_size=2e-4)``: that step, in the update that steps are stated for; all else default."""

    @pytest.mark.parametrize(("settings", "centred"), [({}, False), ({"step_size": 2e-4}, True)], ids=str)
    def test_is_one_of_the_published_update(self, settings, centred, tokenizer):
        for changes, expected in (({}, centred), ({"centred": False}, False), ({"centred": True}, True)):
            config = se.StableEditConfig(edit_modules=MODULES, **settings, **changes)
            editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
            state = editor.state_dict()["normalizer/24 -> 16"]
            assert ("whitening.centred" not in state) == expected

    def test_also_where_the_config_was_made_with_another(self):
        config = dataclasses.replace(se.StableEditConfig(), step_size=2e-4)
        assert config == se.StableEditConfig(step_size=2e-4)
        assert named_editor("stableedit", {"step_size": "2e-4"}).config == config

    @pytest.mark.parametrize("step_size", [1e-6, 2e-4, 1e-2])
    def test_helps_and_ends_at_the_best_pass(self, step_size, tokenizer):
        model, facts = roomy_model("gpt2"), FACTS[:5]
        editor = se.StableEdit(model, tokenizer, se.StableEditConfig(step_size=step_size))
        before = answer_scores(model, editor.tokenize(as_requests(facts)), max_tokens=2048).probability
        turn = editor.edit(facts, progress=False).turns[0]
        after = answer_scores(model, editor.tokenize(as_requests(facts)), max_tokens=2048).probability
        assert after.log().mean() > before.log().mean()
        assert len(facts) - len(turn.failed) == max(turn.taken)


def test_a_turn_that_comes_to_a_halt_has_less_ridge(tokenizer):
    """From the third pass on, a tenth after each pass that helped no request; and no step of such a pass is a measure
    for others, also where the turn is done again from its record."""
    facts = [fact for fact in FACTS if fact["target"] in ("Au", "A", "4")]
    turns, model = [], roomy_model("gptj")
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig(), guard=None)
    other = se.StableEdit(roomy_model("gptj"), tokenizer, se.StableEditConfig(), guard=None)
    editor.on_turn = turns.append
    report = editor.edit(facts, progress=False).turns[0]
    ridges = [applied.ridge for applied in turns[0].passes]
    halts = [report.taken[number] <= report.taken[number - 1] for number in range(2, report.passes)]
    expected = [10.0, 10.0, *(10.0 * 0.1 ** sum(halts[: number + 1]) for number in range(len(halts)))]
    assert any(halts)
    assert ridges == pytest.approx([10.0, *expected[: len(ridges) - 1]])
    steps = [applied.step_size for applied in turns[0].passes if applied.ridge == 10.0]
    assert editor.solver.step.recent == steps
    other.replay(turns[0])
    assert_same_bits(state_of(other), state_of(editor))


@pytest.mark.parametrize("value", ["automatic", "", 0, -1.0, float("nan"), True])
def test_other_step_sizes_are_refused(value):
    with pytest.raises(ValueError, match="step_size must be"):
        se.StableEditConfig(step_size=value)


def test_it_survives_json():
    config = se.StableEditConfig(step_size="auto")
    assert se.StableEditConfig.from_json(config.to_json()) == config


def test_polyak_step_in_python():
    step = PolyakStep(growth=2.0, window=2)
    assert step.choose(3.0, 1.5) == 2.0
    step.accept(1.0)
    kept = step.copy()
    step.accept(5.0)
    assert step.choose(100.0, 1.0) == 10.0
    step.restore(kept)
    assert step.recent == [1.0]
    assert PolyakStep.from_state_dict(step.state_dict()).recent == [1.0]
    with pytest.raises(ValueError, match="vanish"):
        step.choose(1.0, 0.0)
    with pytest.raises(ValueError, match="share"):
        PolyakStep(share=-1.0)


def test_in_a_bench_a_step_may_be_text_or_a_number_in_text():
    assert named_editor("stableedit", {"step_size": "auto"}).config.step_size == "auto"
    assert named_editor("stableedit", {"step_size": "3e-4"}).config.step_size == 3e-4
