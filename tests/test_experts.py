"""Experts of a mixture, edited one by one: what they see, what changes, and where it goes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stableedit_cpp as se
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.editors.candidates import candidate_modules
from stableedit_cpp.export import apply_delta, change_of, export_delta, export_lora, export_model, export_patch
from stableedit_cpp.export.change import change_between
from stableedit_cpp.export.loading import load_export
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.modules import describe_linear_maps, find_modules
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules
from stableedit_cpp.model.tokens import TokenSequence
from support.architectures import build
from support.captures import sequences_of
from support.editors import assert_same_bits
from support.exports import logits
from support.tiny import FACTS

SHORT = [fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS) if len(fact["prompt"]) < 12]
EXPERTS = "model.layers.[45].mlp.experts.down_proj.*"
LAST = "model.layers.5.mlp.experts.down_proj"


def config(**changes) -> se.StableEditConfig:
    return se.StableEditConfig.one_pass(**{"edit_modules": EXPERTS, "step_size": 1e-2, "turn_size": 3} | changes)


def edited(model: nn.Module, tokenizer, **changes) -> se.StableEdit:
    editor = se.StableEdit(model, tokenizer, config(**changes), guard=None)
    editor.edit(SHORT, progress=False)
    return editor


# --- names ---


def test_an_expert_is_found_by_its_number():
    model = build("Mixtral")
    (module,) = find_modules(model, f"{LAST}.2")
    parameter = model.model.layers[5].mlp.experts.down_proj
    assert (module.name, module.shape, module.layout) == (f"{LAST}.2", (24, 16), "linear")
    assert module.weight.data_ptr() == parameter[2].data_ptr()
    names = [module.name for module in find_modules(model, EXPERTS)]
    assert names == [f"model.layers.{layer}.mlp.experts.down_proj.{expert}" for layer in (4, 5) for expert in range(4)]
    assert as_patterns(names) == "model.layers.{4..5}.mlp.experts.down_proj.{0..3}"
    assert "model.layers.{0..5}.mlp.experts.down_proj.{0..3}  (24 -> 16)" in describe_linear_maps(model)
    assert names == [module.name for module in find_modules(model, as_patterns(names))]
    with pytest.raises(ValueError, match=r"down_proj\.4' \(nothing matches\)"):
        find_modules(model, f"{LAST}.4")


def test_a_pattern_of_before_takes_no_experts():
    model = build("Qwen2Moe")
    assert all(not module.is_expert for module in find_modules(model, "*.down_proj"))


def test_defaults_and_what_is_measured():
    """Attention with an automatic step, as elsewhere; all experts of a layer are the MLP where none sees all tokens."""
    mixtral, shared = build("Mixtral"), build("Qwen2Moe")
    assert default_edit_modules(mixtral, automatic=True) == ["model.layers.4.self_attn.o_proj"]
    assert as_patterns(default_edit_modules(mixtral)) == "model.layers.{4..5}.mlp.experts.down_proj.{0..3}"
    found = candidate_modules(mixtral)
    assert list(found)[1:] == ["experts, four of the last third", "experts, last third"]
    assert all("shared_expert." in name for name in default_edit_modules(shared))
    assert not any("experts" in name for name in candidate_modules(shared))


# --- keys and value gradients ---


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss", "GraniteMoe", "Lfm2Moe"])
def test_rows_of_all_experts_make_up_the_gradient_of_their_tensor(kind, tokenizer):
    """Where every token is one of an answer, sums of g h^T are autograd's gradients of the slices, through whatever
    kernel the model itself multiplies with."""
    model = build(kind)
    name = next(name for name, _ in reversed(list(model.named_parameters())) if name.endswith("experts.down_proj"))
    parameter, sequences = model.get_parameter(name), [TokenSequence(s.ids, s.ids) for s in sequences_of(tokenizer)[:6]]
    modules = find_modules(model, f"{name}.*")
    captured = capture(model, modules, sequences, micro_batch=6, max_tokens=70)
    tokens = sum(len(sequence) for sequence in sequences)
    loss = sum(
        nn.functional.cross_entropy(
            model(input_ids=torch.tensor([s.ids])).logits[0], torch.tensor(s.answer), reduction="sum"
        )
        for s in sequences
    )
    (loss / tokens).backward()
    seen = 0
    for index, module in enumerate(modules):
        keys, gradients, rows = captured.rows_of(module)
        seen += int(rows.sum())
        found = gradients.t() @ keys
        exact = parameter.grad[index] if module.layout == "linear" else parameter.grad[index].t()
        assert (found - exact).norm() <= 1e-4 * parameter.grad.norm(), module.name
        assert not captured.value_gradients[module.name][~rows].any()
    assert parameter.grad.norm() > 1e-3
    assert seen == tokens * 2  # two experts a token


def test_an_expert_that_is_not_one_of_several_sums_is_refused(tokenizer, monkeypatch):
    model = build("Mixtral")
    kind = type(model.model.layers[5].mlp.experts)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: 1.5 * own(self, *args))
    with pytest.raises(
        ValueError, match=r"layers\.5\.mlp\.experts computes something else than its experts one by one"
    ):
        edited(model, tokenizer, edit_modules=f"{LAST}.1")


# --- editing ---


@pytest.mark.parametrize(
    "settings", [{}, {"statistics": "per_module", "past_key_weight": 0.1, "max_passes": 3}], ids=str
)
def test_only_what_was_named_changes_and_the_loss_falls(settings, tokenizer):
    model, sequences = build("Mixtral"), sequences_of(tokenizer, SHORT)
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    loss = capture(model, [], sequences, max_tokens=100).losses.mean()
    editor = edited(model, tokenizer, edit_modules=f"{LAST}.[02]", turn_size=5, **settings)
    assert capture(model, [], sequences, max_tokens=100).losses.mean() < loss
    for name, part in model.named_parameters():
        if name != LAST:
            assert torch.equal(part, before[name]), name
    changed = [not torch.equal(new, old) for new, old in zip(model.get_parameter(LAST), before[LAST], strict=True)]
    assert changed == [True, False, True, False]
    assert set(editor.weight_changes()) == {f"{LAST}.0", f"{LAST}.2"}


def test_statistics_are_of_the_tokens_an_expert_sees(tokenizer):
    model = build("Mixtral")
    editor = edited(model, tokenizer, statistics="per_module", turn_size=len(SHORT), edit_modules=f"{LAST}.*")
    fresh = build("Mixtral")
    captured = capture(fresh, find_modules(fresh, f"{LAST}.*"), editor.tokenize(as_requests(SHORT)), max_tokens=100)
    rows = {name: int(keys.any(1).sum()) for name, keys in captured.keys.items()}
    assert {name: normalizer.count for name, normalizer in editor.normalizers.items()} == rows
    assert sum(rows.values()) == 2 * len(captured.request)


def test_an_expert_without_a_token_stays_as_it_is(tokenizer):
    model = build("Mixtral")
    for layer in model.model.layers:  # the router's scores of the last expert are the lowest
        layer.mlp.gate.weight.data[3] = 0.0
        layer.mlp.gate.weight.data[:3].abs_()
        layer.post_attention_layernorm.register_forward_hook(lambda _module, _args, out: out.abs())
    before = model.get_parameter(LAST)[3].detach().clone()
    for settings in ({}, {"statistics": "per_module"}):
        edited(model, tokenizer, edit_modules=f"{LAST}.*", **settings)
        assert torch.equal(model.get_parameter(LAST)[3], before)


def test_half_precision_is_the_master_rounded(tokenizer):
    model = build("Mixtral", torch.bfloat16)
    editor = edited(model, tokenizer)
    for module in editor.modules:
        weight = editor.weights[module.name]
        assert weight.live.data_ptr() == module.weight.data_ptr()
        assert torch.equal(module.weight, weight.master.to(torch.bfloat16))
    assert any(not torch.equal(weight.master, weight.live.float()) for weight in editor.weights.values())


def test_ultraedit_edits_experts_and_the_others_say_no(tokenizer):
    for bias in (True, False):
        model = build("Mixtral")
        settings = se.UltraEditConfig(edit_modules=EXPERTS, step_size=1e-2, turn_size=3, unbiased_batches=bias)
        assert se.UltraEdit(model, tokenizer, settings, guard=None).edit(SHORT, progress=False).edits == len(SHORT)
    with pytest.raises(ValueError, match="one expert of a mixture, which FineTune does not edit"):
        se.FineTune(model, tokenizer, se.FineTuneConfig(edit_modules=EXPERTS))


def test_no_statistics_of_text(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is one expert, which does not see every token of a text"):
        se.gather_statistics(build("Mixtral"), tokenizer, tmp_path / "text.txt", tmp_path / "out", edit_modules=EXPERTS)


def test_the_model_is_left_as_found(tokenizer):
    model = build("Mixtral")
    editor = edited(model, tokenizer)
    experts = model.model.layers[5].mlp.experts
    assert "forward" not in vars(experts) and experts.down_proj.requires_grad
    plain = logits(build("Mixtral"))
    with editor.unedited() as base:
        assert torch.equal(logits(base), plain)
    assert not torch.equal(logits(model), plain)


# --- sessions and exports ---


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_a_session(detail, tokenizer, tmp_path):
    settings = config(past_key_weight=0.05)
    with LifelongSession.create(tmp_path / "s", build("Mixtral"), tokenizer, settings, detail=detail) as session:
        session.edit(SHORT, progress=False)
        session.revert(["f1"], progress=False)
        left = session.editor.weight_changes()
    with LifelongSession.open(tmp_path / "s", build("Mixtral"), tokenizer) as session:
        assert_same_bits(session.editor.weight_changes(), left)
        session.rollback(1, progress=False)
        session.edit(SHORT[3:], progress=False)
    other = build("Mixtral")
    with torch.no_grad():
        other.get_parameter("model.layers.4.mlp.experts.gate_up_proj")[0].mul_(1.5)
    with pytest.raises(ValueError, match="weights of the model outside the edited modules are others"):
        LifelongSession.open(tmp_path / "s", other, tokenizer)


def test_an_expert_beside_the_edited_ones_is_outside_of_them(tokenizer, tmp_path):
    settings = config(edit_modules=f"{LAST}.[012]")
    LifelongSession.create(tmp_path / "s", build("Mixtral"), tokenizer, settings).close()
    LifelongSession.open(tmp_path / "s", build("Mixtral"), tokenizer).close()
    other = build("Mixtral")
    with torch.no_grad():
        other.get_parameter(LAST)[3].mul_(1.5)
    with pytest.raises(ValueError, match="weights of the model outside the edited modules are others"):
        LifelongSession.open(tmp_path / "s", other, tokenizer)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_exports(kind, tokenizer, tmp_path):
    """GPT-OSS holds its experts the other way round."""
    editor = edited(build(kind), tokenizer)
    change, model = change_of(editor), editor.model
    assert sorted(change.tensors) == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (4, 5)]
    assert set(change.modules) == set(change.experts) == {module.name for module in editor.modules}
    base = build(kind)
    again = change_between(base, model)
    assert again.modules.keys() == change.modules.keys() and not again.others
    export_delta(change, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta")
    assert torch.equal(logits(base), logits(model))
    export_patch(change, tmp_path / "patch")
    patched, _ = load_export(tmp_path / "patch", lambda *_: (build(kind), tokenizer), base="tiny")
    assert torch.allclose(logits(patched), logits(model), atol=1e-4)
    assert "find_modules(model, list(patch.modules))" in (tmp_path / "patch/README.md").read_text()
    export_model(model, tokenizer, tmp_path / "model")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "model").eval()), logits(model))
    with pytest.raises(ValueError, match=r"one of several experts in a tensor; export a delta, a patch or the whole"):
        export_lora(change, tmp_path / "adapter", rank=2)
