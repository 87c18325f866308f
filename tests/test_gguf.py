"""GGUF files: transformers reads the edited model back, and an adapter is what lies between base and edited."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.export import change_of, export_gguf, export_gguf_lora
from stableedit_cpp.export.llama_cpp.architectures import rope_factors
from support.exports import card_of, facts_of
from support.tiny import FACTS
from support.vocabularies import SENTENCES, byte_level, sentence_piece

gguf = pytest.importorskip("gguf")

_SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 96, "vocab_size": 400, "max_position_embeddings": 256, "pad_token_id": 0},
}
# transformers reads no size of a head back for Qwen 3 and no scale of scores for Gemma 3; these are what it assumes.
KINDS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}, byte_level(bos=True)),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}, sentence_piece(space_in_front=True)),
    "qwen2": ("Qwen2Config", {}, byte_level()),
    "qwen3": ("Qwen3Config", {"head_dim": 128}, byte_level()),
    "gemma3_text": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "head_dim": 256, "sliding_window": 8},
        sentence_piece(),
    ),
}
EDITED = ["model.layers.*.mlp.down_proj", "model.layers.1.self_attn.{q,k,v}_proj"]


def make(kind: str, **changes):
    """(model, tokenizer) of random weights, of which no two norms and biases are alike."""
    config_class, own, tokenizer = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(_SIZES | own | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, tokenizer


def edited(kind: str) -> se.StableEdit:
    model, tokenizer = make(kind)
    config = se.StableEditConfig.one_pass(edit_modules=EDITED, step_size=1e-2, turn_size=5)
    editor = se.StableEdit(model, tokenizer, config)
    editor.edit(FACTS[:5])
    return editor


def read_back(directory):
    options = {"gguf_file": "model.gguf"}
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(directory, **options)


def greedy(model, tokenizer, prompt: str) -> list[int]:
    return model.generate(
        **tokenizer(prompt, return_tensors="pt"), do_sample=False, min_new_tokens=8, max_new_tokens=8, pad_token_id=0
    ).tolist()


def tensors_of(path) -> dict[str, torch.Tensor]:
    """By name, as float32 matrices ``[v, k]``."""
    reader = gguf.GGUFReader(path)
    return {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_edited_model_back(tmp_path, kind):
    editor = edited(kind)
    export_gguf(editor.model, editor.tokenizer, tmp_path / "out")
    model, tokenizer = read_back(tmp_path / "out")
    torch.testing.assert_close(model.state_dict(), editor.model.state_dict(), rtol=0, atol=1e-6)
    for text in SENTENCES:
        assert tokenizer(text).input_ids == editor.tokenizer(text).input_ids
    for fact in FACTS[:3]:
        assert greedy(model, tokenizer, fact["prompt"]) == greedy(editor.model, editor.tokenizer, fact["prompt"])
    assert facts_of(tmp_path / "out")["kind"] == "gguf"
    assert "llama-server -m model.gguf" in card_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_adapter_is_what_editing_added(tmp_path, kind):
    """llama.cpp adds alpha / r times B A to each weight, in its own order of rows."""
    editor = edited(kind)
    change = change_of(editor)
    report = export_gguf_lora(change, tmp_path / "adapter", rank=64)
    export_gguf(editor.model, editor.tokenizer, tmp_path / "edited")
    with editor.unedited() as base:
        export_gguf(base, editor.tokenizer, tmp_path / "base")
    reader = gguf.GGUFReader(tmp_path / "adapter/adapter.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    assert (
        said["general.architecture"]
        == gguf.GGUFReader(tmp_path / "base/model.gguf").fields["general.architecture"].contents()
    )
    base, after = (tensors_of(tmp_path / name / "model.gguf") for name in ("base", "edited"))
    factors = tensors_of(tmp_path / "adapter/adapter.gguf")
    changed = [name for name in base if not torch.equal(base[name], after[name])]
    assert {f"{name}.{side}" for name in changed for side in ("lora_a", "lora_b")} == factors.keys()
    for name in changed:
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        assert (a.shape, b.shape) == ((64, base[name].shape[1]), (base[name].shape[0], 64))
        torch.testing.assert_close(
            base[name] + said["adapter.lora.alpha"] / 64 * b @ a, after[name], rtol=1e-4, atol=1e-5
        )
    assert len(changed) == len(report.modules) == len(editor.modules)


def test_rotary_factors_of_llama_3():
    """Long waves are slowed by the factor, short ones not, those between in proportion (the formula of Llama 3.1)."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, _ = make("llama", rope_parameters=rope | {"original_max_position_embeddings": 64})
    waves = 2 * torch.pi * 5e5 ** (torch.arange(0, 16, 2) / 16)
    smooth = ((64 / waves - 1) / (4 - 1)).clamp(0, 1)
    torch.testing.assert_close(rope_factors(model.config), 1 / ((1 - smooth) / 8 + smooth))
    assert rope_factors(make("qwen2")[0].config) is None


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")], ids=str)
def test_half_precision(tmp_path, dtype, name):
    model, tokenizer = make("qwen2")
    export_gguf(model, tokenizer, tmp_path / "out", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kinds[name] for name in kinds if name.endswith(("norm.weight", "bias"))} == {"F32"}
    assert {kinds[name] for name in kinds if not name.endswith(("norm.weight", "bias"))} == {name}
    back, _ = read_back(tmp_path / "out")
    weight = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(back.model.layers[1].mlp.down_proj.weight, weight.to(dtype).float())


def test_vocabulary(tmp_path):
    """Kinds of tokens, scores by the first merge, rows without a token."""
    model, tokenizer = make("gemma3_text")
    tokenizer = sentence_piece()
    tokenizer.add_tokens(["joined▁words"])
    export_gguf(model, tokenizer, tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out/model.gguf").fields
    said = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    tokens, kinds, scores = said["tokens"], said["token_type"], said["scores"]
    assert len(tokens) == len(kinds) == len(scores) == 400
    kind = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, kinds, strict=True)}
    assert (kind["<bos>"], kind["<unk>"], kind["<0x0A>"], kind["al"]) == ("CONTROL", "UNKNOWN", "BYTE", "NORMAL")
    assert (kind["joined words"], kind["[PAD399]"]) == ("USER_DEFINED", "UNUSED")
    assert (said["model"], said["add_bos_token"], said["add_eos_token"]) == ("llama", True, False)
    assert said["add_space_prefix"] is False
    assert (tokens[said["bos_token_id"]], tokens[said["eos_token_id"]]) == ("<bos>", "<eos>")
    made = [
        tokens[index]
        for index in sorted(range(400), key=lambda index: -scores[index])
        if kind[tokens[index]] == "NORMAL"
    ]
    assert made.index("al") < made.index(max(made, key=len))  # merged before it


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer", "GemmaTokenizer"])
def test_tokenizers_of_transformers_are_known(tmp_path, name):
    """As transformers builds them from a vocabulary, for models that people have."""
    kind, model, pre, space = {
        "Qwen2Tokenizer": ("qwen2", "gpt2", "qwen2", None),
        "GPT2Tokenizer": ("llama", "gpt2", "gpt-2", None),
        "LlamaTokenizer": ("mistral", "llama", "default", True),
        "GemmaTokenizer": ("gemma3_text", "llama", "default", False),
    }[name]
    trained = sentence_piece() if model == "llama" else byte_level()
    definition = json.loads(trained.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in definition["merges"]]
    tokenizer = getattr(transformers, name)(vocab=definition["vocab"], merges=merges)
    export_gguf(make(kind, vocab_size=420)[0], tokenizer, tmp_path / "out")
    said = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "out/model.gguf").fields.items()}
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == (model, pre)
    assert said.get("tokenizer.ggml.add_space_prefix") is space


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "smollm"])
def test_names_of_splits(tmp_path, name):
    """By the expressions that transformers reads back for llama.cpp's names."""
    known = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    definition = json.loads(byte_level().backend_tokenizer.to_str())
    bytes_ = definition["pre_tokenizer"] | {"use_regex": name == "smollm"}
    first = {"type": "Digits", "individual_digits": True}
    if name != "smollm":
        first = {"type": "Split", "pattern": {"Regex": known[name]}, "behavior": "Isolated", "invert": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, bytes_]}
    definition["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    backend = Tokenizer.from_str(json.dumps(definition))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    export_gguf(make("llama")[0], tokenizer, tmp_path / "out")
    said = gguf.GGUFReader(tmp_path / "out/model.gguf").fields["tokenizer.ggml.pre"].contents()
    assert said == name


REFUSED = {
    "architecture": ("gpt2", {}, "written of .*qwen2.* and this model is a gpt2; .*convert_hf_to_gguf.py"),
    "window": ("mistral", {"sliding_window": 8}, "this mistral has a sliding window, .*convert_hf_to_gguf.py"),
    "activation": ("llama", {"hidden_act": "relu"}, "this llama has an activation 'relu'"),
    "scale": ("gemma3_text", {"query_pre_attn_scalar": 7}, "attention scores on a scale of its own"),
    "rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "scales its rotary positions by 'dynamic'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_known_is_refused(tmp_path, what):
    kind, changes, message = REFUSED[what]
    if kind == "gpt2":
        model, tokenizer = (
            transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1)),
            byte_level(),
        )
    else:
        model, tokenizer = make(kind, **changes)
    with pytest.raises(ValueError, match=message):
        export_gguf(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_are_refused(tmp_path):
    model, _ = make("qwen2")
    unknown = byte_level()
    unknown.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"splits a text .Whitespace. has no name in llama.cpp .*convert_hf_to_gguf"):
        export_gguf(model, unknown, tmp_path / "out")
    with pytest.raises(ValueError, match="the tokenizer has 299 tokens, and the model's embedding 100 rows"):
        export_gguf(make("qwen2", vocab_size=100)[0], byte_level(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_float16_cannot_hold(tmp_path):
    model, tokenizer = make("qwen2")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=re.escape("blk.0.ffn_down.weight has values that float16 cannot hold")):
        export_gguf(model, tokenizer, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_output_layer_that_is_the_embedding(tmp_path):
    from stableedit_cpp.core import WeightChange
    from stableedit_cpp.export.change import ModelChange, skeleton_of

    model, _ = make("llama")
    change = WeightChange(torch.ones(400, 64))
    whole = ModelChange("", {"lm_head.weight": torch.ones(400, 64)}, {"lm_head": change}, [], skeleton_of(model))
    with pytest.raises(ValueError, match="lm_head is the embedding of this model"):
        export_gguf_lora(whole, tmp_path / "out", rank=1)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    editor = edited("qwen2")
    with editor.unedited() as base:
        base.save_pretrained("base")
    editor.model.save_pretrained("edited")
    for name in ("base", "edited"):
        editor.tokenizer.save_pretrained(name)
    arguments = ["export", "--device", "cpu", "--base", "base", "--edited", "edited"]
    assert main([*arguments, "--format", "gguf", "--dtype", "float16", "--output", "whole"]) == 0
    assert main([*arguments, "--format", "gguf-lora", "--keep", "0.9", "--output", "adapter"]) == 0
    out = capsys.readouterr().out
    assert "The GGUF file of the whole model with 6 changed tensors is in whole, with a model card" in out
    assert re.search(r"The LoRA adapter for llama.cpp of rank \d+ for 6 modules keeps 9\d\.\d % of", out)
    assert facts_of(tmp_path / "adapter")["kept_norm"] >= 0.9
    assert read_back("whole")[0].config.model_type == "qwen2"


def test_is_written_with_a_transformers_that_packs_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.dequant", None)
    export_gguf(*make("llama"), tmp_path / "out")
    assert (tmp_path / "out/model.gguf").is_file()
