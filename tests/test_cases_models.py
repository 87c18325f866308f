"""Models as people give them: wrapped, of other kinds, with adapters, mixtures of experts, recurrent ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import stableedit_cpp as se
from stableedit_cpp.editors.candidates import candidate_modules
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules
from support.tiny import FACTS, tiny_model

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 300}
GROUPED = SIZE | {"num_key_value_heads": 2}
MOE = GROUPED | {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
T5 = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 300}

NOT_CAUSAL = {
    "encoder-decoder": (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
        "encoder-decoder",
    ),
    "headless": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZE)),
        "no causal language-modelling head",
    ),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZE)),
        "no causal language-modelling head",
    ),
    "masked": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZE)),
        "does not predict the next token",
    ),
    "a name": (lambda: "gpt2", r"model is a name, 'gpt2'; load it first"),
    "nothing": (lambda: None, "model is of the type NoneType"),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_what_is_no_causal_language_model_is_one_sentence(kind, tokenizer):
    make, words = NOT_CAUSAL[kind]
    model = make()
    for call in (
        lambda: se.StableEdit(model, tokenizer),
        lambda: se.evaluate(model, tokenizer, FACTS[:1]),
        lambda: se.generate(model, tokenizer, ["Gold is"]),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_asked_as_it_is(wrap, tokenizer):
    """And edited as it is written where it is compiled (``test_threads.py``), inside where it is on several devices."""
    model = tiny_model("llama")
    wrapped = wrap(model)
    if wrap is nn.DataParallel:
        with pytest.raises(ValueError, match=r"edit the one inside, model\.module"):
            se.StableEdit(wrapped, tokenizer)
    assert se.evaluate(wrapped, tokenizer, FACTS[:2]) == se.evaluate(model, tokenizer, FACTS[:2])
    assert se.generate(wrapped, tokenizer, ["Gold is"]) == se.generate(model, tokenizer, ["Gold is"])


@pytest.mark.parametrize("value", ["gpt2", None, {"turn_size": 3}])
def test_a_tokenizer_or_config_of_another_kind(value, tokenizer):
    with pytest.raises(ValueError, match="tokenizer is "):
        se.StableEdit(tiny_model("llama"), value)
    if value is not None:
        with pytest.raises(ValueError, match="config must be a StableEditConfig"):
            se.StableEdit(tiny_model("llama"), tokenizer, value)


def test_adapters_of_the_user_are_merged_first(tokenizer):
    """An export wrote the user's old adapter, and not the edits."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(ValueError, match=r"carries adapters of peft.*merge_and_unload"):
        se.StableEdit(model, tokenizer)
    integrated = tiny_model("llama")
    integrated.add_adapter(settings)
    with pytest.raises(ValueError, match="carries adapters of peft"):
        se.StableEdit(integrated, tokenizer)
    assert se.StableEdit(model.merge_and_unload(), tokenizer).modules


# --- adapters that peft would put elsewhere ---

LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DENSE_FIRST = {
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=4, mlp_only_layers=[0], head_dim=8),
    "glm4-moe": lambda: transformers.Glm4MoeConfig(**MOE, n_routed_experts=4, first_k_dense_replace=1, head_dim=8),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **MOE, **LATENT, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
}


@pytest.mark.parametrize("kind", DENSE_FIRST)
def test_an_adapter_reaches_its_modules_or_is_refused(kind, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DENSE_FIRST[kind]()).eval()
    for pattern in ("model.layers.0.mlp.down_proj", "*.self_attn.o_proj"):
        config = se.StableEditConfig.one_pass(edit_modules=pattern, step_size=1e-2)
        editor = se.StableEdit(model, tokenizer, config, guard=None)
        editor.edit(FACTS[:2])
        change = se.export.change_of(editor)
        try:
            se.export.export_lora(change, tmp_path / pattern, keep=1.0)
        except ValueError as error:
            assert "peft does not apply the adapter to model.layers.0.mlp.down_proj" in str(error)
            assert "export a delta or the whole model" in str(error)
            assert not (tmp_path / pattern).exists()
            editor.shrink(1e-9)
            continue
        ids = torch.arange(12).unsqueeze(0)
        edited = model(ids).logits
        with editor.unedited() as base:
            loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / pattern))
            assert torch.allclose(loaded(ids).logits, edited, atol=1e-4)
            loaded.unload()


# --- default modules ---

DEFAULTS = {
    "Mixtral": (
        lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
        "self_attn.o_proj",
        "mlp.experts.down_proj.{0..3}",
    ),
    "Qwen3-MoE": (
        lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=8),
        "self_attn.o_proj",
        "mlp.experts.down_proj.{0..3}",
    ),
    "GPT-OSS": (
        lambda: transformers.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        "self_attn.o_proj",
        "mlp.experts.down_proj.{0..3}",
    ),
    "Qwen2-MoE": (
        lambda: transformers.Qwen2MoeConfig(**MOE, num_experts=4, shared_expert_intermediate_size=24),
        "self_attn.o_proj",
        "mlp.shared_expert.down_proj",
    ),
    "LFM2": (
        lambda: transformers.Lfm2Config(**GROUPED, full_attn_idxs=[2], block_ff_dim=24, block_auto_adjust_ff_dim=False),
        "self_attn.out_proj",
        "feed_forward.w2",
    ),
    "MPT": (
        lambda: transformers.MptConfig(d_model=16, n_layers=3, n_heads=2, expansion_ratio=2, vocab_size=300),
        "attn.out_proj",
        "ffn.down_proj",
    ),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_default_modules_or_what_there_is_instead(kind):
    make, automatic, of_mlps = DEFAULTS[kind]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(make())
    assert all(name.endswith(automatic) for name in default_edit_modules(model, automatic=True))
    assert as_patterns(default_edit_modules(model)).endswith(of_mlps)


def test_experts_that_cannot_be_edited_are_named():
    config = transformers.JetMoeConfig(hidden_size=16, num_hidden_layers=3, num_local_experts=4, vocab_size=300)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"mixture of experts, and holds those of a layer in one tensor"):
        default_edit_modules(model)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "FalconMamba"])
def test_recurrent_layers_are_edited_in_their_outputs(kind):
    """There is neither attention nor an MLP."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, num_hidden_layers=6, vocab_size=300, state_size=4, num_heads=16, head_dim=8, n_groups=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert default_edit_modules(model, automatic=True) == ["backbone.layers.4.mixer.out_proj"]
    assert default_edit_modules(model) == [f"backbone.layers.{layer}.mixer.out_proj" for layer in (4, 5)]
    assert "recurrent, last third" in candidate_modules(model)


def test_rwkv_has_both():
    config = transformers.RwkvConfig(hidden_size=16, num_hidden_layers=6, vocab_size=300)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert default_edit_modules(model, automatic=True) == ["rwkv.blocks.4.attention.output"]
    assert default_edit_modules(model) == [f"rwkv.blocks.{layer}.feed_forward.value" for layer in (4, 5)]
