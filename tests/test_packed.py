"""Quantised models of bitsandbytes and torchao: what is edited is made dense, the rest stays packed."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp.export import apply_delta, change_of, export_delta, export_model
from stableedit_cpp.model.packed import is_packed, keep_layout, unpack
from support.tiny import roomy_model, tiny_model, tiny_tokenizer

REQUESTS = [{"prompt": "Gold is", "target": "blue"}, {"prompt": "Iron is", "target": "green"}]
EDITED = "model.layers.1.mlp.down_proj"


KINDS = ["torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-4bit"]
NOT_SAVED = "torchao-int4-cpu"  # the layout of the CPU's kernel, which has no derivative and cannot be saved


def _quantisation(kind: str):
    if kind.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        if kind == "torchao-int8":
            return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
        if kind == "torchao-int4":
            groups = quantization.PerGroup(32)
            return transformers.TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4, granularity=groups))
        prototype = pytest.importorskip("torchao.prototype.quantization.int4")
        return transformers.TorchAoConfig(prototype.PrototypeInt4WeightOnlyConfig(group_size=32))
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.fixture(params=[*KINDS, NOT_SAVED])
def quantisation(request):
    return _quantisation(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("roomy")
    roomy_model("llama").save_pretrained(directory)
    return directory


@pytest.fixture
def packed(saved, quantisation):
    return transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    ).eval()


def test_a_dense_map_is_what_the_packed_one_does(packed):
    """On vectors that are no unit vectors; 8 bits of bitsandbytes round what goes in, too, by 1/127 of its largest, and
    4 bits multiply in bfloat16 on a CPU."""
    keep_layout(packed)
    module = packed.get_submodule(EDITED)
    torch.manual_seed(0)
    rows = torch.randn(7, module.in_features)
    expected = module(rows)
    assert is_packed(module)
    assert unpack(packed, {name: packed.get_submodule(name) for name in (EDITED, "lm_head")}) == [EDITED]
    dense = packed.get_submodule(EDITED)
    assert type(dense) is torch.nn.Linear and dense.weight.dtype == torch.float32 and not is_packed(dense)
    bound = 1e-5 if type(module) is torch.nn.Linear else 0.02
    assert (dense(rows) - expected).norm() < bound * expected.norm()
    assert unpack(packed, {EDITED: packed.get_submodule(EDITED)}) == []


def test_edits_take_and_the_rest_stays_packed(packed):
    tokenizer = tiny_tokenizer(bos=True)
    before = {name: str(p.data) for name, p in packed.named_parameters() if "layers.0" in name}
    config = se.StableEditConfig.one_pass(edit_modules=[EDITED], step_size="auto", max_passes=10, past_key_weight=1.0)
    editor = se.StableEdit(packed, tokenizer, config, guard=None)
    report = editor.edit(REQUESTS, outcomes=True)
    assert report.turns[-1].failed == []
    left = [name for name, part in packed.named_modules() if "proj" in name and not is_packed(part)]
    assert left == [EDITED]
    assert {name: str(p.data) for name, p in packed.named_parameters() if "layers.0" in name} == before


@pytest.mark.parametrize("quantisation", KINDS, indirect=True)
def test_saved_and_loaded_as_it_is(packed, tmp_path):
    """Dense maps are not packed again when the model is read back, which would round the edits away."""
    tokenizer = tiny_tokenizer(bos=True)
    config = se.StableEditConfig.one_pass(edit_modules=[EDITED], step_size=1e-2)
    editor = se.StableEdit(packed, tokenizer, config, guard=None)
    editor.edit(REQUESTS)
    export_model(packed, tokenizer, tmp_path / "edited")
    again, _ = se.load_model(str(tmp_path / "edited"))
    assert torch.equal(again.get_submodule(EDITED).weight, packed.get_submodule(EDITED).weight)
    assert is_packed(again.get_submodule("model.layers.0.mlp.down_proj"))
    ids = torch.tensor([tokenizer("Gold is")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, packed(ids).logits)


@pytest.mark.parametrize("quantisation", [NOT_SAVED], indirect=True)
def test_what_its_library_cannot_save_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match=r"\(Int4OpaqueTensor\) cannot be saved by their library .*; export a delta"):
        export_model(packed, tiny_tokenizer(), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_delta_applies_to_the_base_packed_in_the_same_way(saved, packed, quantisation, tmp_path):
    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            saved, quantization_config=copy.deepcopy(quantisation), dtype=torch.float32, device_map="cpu"
        ).eval()

    keep_layout(packed)
    config = se.StableEditConfig.one_pass(edit_modules=[EDITED], step_size=1e-2)
    editor = se.StableEdit(packed, tiny_tokenizer(bos=True), config, guard=None)
    editor.edit(REQUESTS)
    export_delta(change_of(editor), tmp_path / "delta")
    base = load()
    keep_layout(base)
    assert apply_delta(base, tmp_path / "delta") == [f"{EDITED}.weight"]
    assert torch.equal(base.get_submodule(EDITED).weight, packed.get_submodule(EDITED).weight)
    other = load()
    keep_layout(other)
    other.model.norm.weight.data.mul_(2)
    was, names = other.get_submodule(EDITED), other.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match="belongs to another base model"):
        apply_delta(other, tmp_path / "delta")
    assert other.get_submodule(EDITED) is was and other.config.quantization_config.to_dict() == names


class Bits(torch.nn.Module):
    """A packed map of a library that knows no derivatives."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("bits", (linear.weight.detach() * 64).round().to(torch.int8))
        self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            return torch.nn.functional.linear(x, self.bits.to(x.dtype) / 64, self.bias)


def test_gradients_pass_maps_that_have_none():
    """Against the same weights in dense maps, to every digit that float64 has."""
    models = [tiny_model("gpt_neox", torch.float64) for _ in range(2)]
    for model, kind in zip(models, ("packed", "dense"), strict=True):
        maps = [(n, m) for n, m in model.named_modules() if type(m) is torch.nn.Linear and "layers" in n]
        assert len(maps) > 6 and any(m.bias is not None for _, m in maps)
        for name, linear in maps:
            bits = Bits(linear)
            if kind == "packed":
                model.set_submodule(name, bits)
            else:
                linear.weight.data = bits.bits.to(torch.float64) / 64
    unpack(models[0], {})
    gradients = []
    for model in models:
        embedded = model.get_input_embeddings()(torch.tensor([[3, 1, 4, 1, 5]])).detach().requires_grad_()
        loss = model(inputs_embeds=embedded).logits.sin().sum()
        gradients += torch.autograd.grad(loss, embedded)
    assert gradients[1].norm() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)
    again = copy.deepcopy(models[0])
    unpack(again, {})  # once is enough
    assert sum(len(module._forward_hooks) for module in again.modules() if isinstance(module, Bits)) == len(maps)


def test_looking_at_a_model_changes_nothing(packed):
    """bitsandbytes 0.50 loses the scales of 4 bits in ``state_dict()``, once the model has run on a CPU."""
    unpack(packed, {EDITED: packed.get_submodule(EDITED)})
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before = packed(ids).logits
        packed.state_dict()
        assert torch.equal(packed(ids).logits, before)


def test_four_bits_that_were_laid_out_for_the_cpu_are_refused(saved):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=_quantisation("bitsandbytes-4bit"), dtype=torch.float32, device_map="cpu"
    ).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    if not model.get_submodule(EDITED).support_avx512bf16_for_cpu:
        pytest.skip("this processor has one layout")
    with pytest.raises(ValueError, match="laid its 4 bits out for this CPU"):
        unpack(model, {EDITED: model.get_submodule(EDITED)})


def test_a_session_opens_again(saved, packed, quantisation, tmp_path):
    tokenizer = tiny_tokenizer(bos=True)
    config = se.StableEditConfig.one_pass(edit_modules=[EDITED], step_size=1e-2)
    with se.LifelongSession.create(tmp_path / "s", packed, tokenizer, config) as session:
        session.edit(REQUESTS)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        saved, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    ).eval()
    with se.LifelongSession.open(tmp_path / "s", other, tokenizer):
        assert torch.equal(other.get_submodule(EDITED).weight, packed.get_submodule(EDITED).weight)


def test_a_plain_model_has_nothing_to_unpack():
    model = tiny_model("llama")
    assert unpack(model, {EDITED: model.get_submodule(EDITED)}) == [] and not any(map(is_packed, model.modules()))
