"""Quantised models of bitsandbytes and torchao: what is edited is made dense, the rest stays packed."""

from __future__ import annotations

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp.export import export_model
from stableedit_cpp.model.packed import is_packed, keep_layout, unpack
from support.tiny import roomy_model, tiny_model, tiny_tokenizer

REQUESTS = [{"prompt": "Gold is", "target": "blue"}, {"prompt": "Iron is", "target": "green"}]
EDITED = "model.layers.1.mlp.down_proj"


def _quantisation(kind: str):
    if kind == "torchao-int8":
        quantization = pytest.importorskip("torchao.quantization")
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    if kind == "bitsandbytes-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


@pytest.fixture(params=["torchao-int8", "bitsandbytes-int8", "bitsandbytes-4bit"])
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
