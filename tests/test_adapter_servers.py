"""Adapters by the rules of the loaders of vLLM and SGLang, which need a GPU to run: read in their source, written here.

vLLM: vllm/lora/peft_helper.py (the config), lora_model.py and utils.py (names, tensors), worker_manager.py (modules).
SGLang: python/sglang/srt/lora/lora_config.py, lora.py, utils.py (names), mem_pool.py (tensors).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stableedit_cpp.export import change_of, export_lora
from stableedit_cpp.export.lora import SERVED_RANKS
from support.exports import card_of, edited

pytest.importorskip("peft")

# What both replace by layers with LoRA in models of the Llama kind: packed_modules_mapping of vLLM, utils.py of SGLang.
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SERVED_KINDS = ["llama", "qwen3", "gemma"]  # Mistral and Qwen 2 have the modules of Llama
BOTH = ["model.layers.*.mlp.down_proj", "model.layers.{0,2}.self_attn.o_proj"]


def read(directory: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


def check_vllm(directory: Path, model: torch.nn.Module, max_lora_rank: int) -> dict[str, torch.Tensor]:
    """What vLLM adds to each module; an AssertionError with the rule that is broken."""
    config, tensors = read(directory)
    # PEFTHelper: three required fields; _validate_features; validate_legal.
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert not config.get("modules_to_save"), "modules_to_save being None"
    assert not config.get("use_dora"), "DoRA"
    assert config.get("bias", "none") == "none", "bias"
    assert config["r"] <= max_lora_rank, "r is greater than max_lora_rank"
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    # parse_fine_tuned_lora_name, then check_unexpected_modules: the last part of the name is what counts.
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", name)
        assert found, f"{name} is unsupported LoRA weight"
        assert found[1].rsplit(".", 1)[-1] in SERVED, f"expected target modules in {SERVED}"
        assert tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)  # converted to that of the server
        pairs.setdefault(found[1], {})[found[2]] = tensor
    # set_lora copies A [r, k] and B [v, r] into buffers of max_lora_rank, and leaves the rest of them zero.
    added = {}
    for name, pair in pairs.items():
        v, k = model.get_submodule(name).weight.shape
        assert (pair["lora_A"].shape, pair["lora_B"].shape) == ((config["r"], k), (v, config["r"]))
        added[name] = scale * pair["lora_B"].double() @ pair["lora_A"].double()
    return added


def check_sglang(directory: Path, model: torch.nn.Module) -> None:
    config, tensors = read(directory)
    # LoRAConfig and LoRAAdapter: one rank and one alpha, no DoRA, no tokens of its own.
    assert config["peft_type"].lower() == "lora"
    assert not config.get("rank_pattern") and not config.get("alpha_pattern"), "one rank for all modules"
    assert not config.get("use_dora") and not config.get("use_rslora"), "scaling is lora_alpha / r"
    assert not (directory / "added_tokens.json").exists()
    # get_normalized_target_modules: a list, of which the last part of each name counts.
    assert isinstance(config["target_modules"], list)
    assert {name.split(".")[-1] for name in config["target_modules"]} <= SERVED
    for name, tensor in tensors.items():
        # get_layer_id, by which the tensors of a layer are found.
        layer = re.search(r"layers\.(\d+)\.", name)
        assert layer and int(layer[1]) < model.config.num_hidden_layers
        assert config["r"] in (tensor.shape[0] if "lora_A" in name else tensor.shape[1],)
        # normalize_qkv_proj and normalize_gate_up_proj stack neighbours, which have to be there together.
        for one, other in (("gate_proj", "up_proj"), ("up_proj", "gate_proj")):
            assert one not in name or name.replace(one, other) in tensors, f"{one} without {other}"


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in SERVED_KINDS), ("llama", torch.bfloat16)], ids=str
)
def test_adapters_of_edits_are_served(tmp_path, kind, dtype):
    editor = edited(kind, dtype, modules=BOTH)
    report = export_lora(change_of(editor), tmp_path / "adapter", rank=16)
    added = check_vllm(tmp_path / "adapter", editor.model, report.rank)
    check_sglang(tmp_path / "adapter", editor.model)
    assert added.keys() == {module.name for module in editor.modules}
    for name, change in editor.weight_changes().items():
        close = torch.finfo(dtype).eps
        torch.testing.assert_close(added[name], change.double(), rtol=64 * close, atol=8 * close)


def test_the_card_names_a_rank_that_vllm_takes(tmp_path):
    export_lora(change_of(edited()), tmp_path / "adapter", rank=5)
    told = int(re.search(r"--max-lora-rank (\d+)", card_of(tmp_path / "adapter"))[1])
    assert told in SERVED_RANKS
    check_vllm(tmp_path / "adapter", edited().model, told)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"r": 600}, "max_lora_rank"),
    ],
)
def test_the_check_notices_what_vllm_refuses(tmp_path, change, rule):
    editor = edited()
    export_lora(change_of(editor), tmp_path / "adapter", rank=4)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AssertionError, match=rule):
        check_vllm(tmp_path / "adapter", editor.model, 512)


def test_the_checks_notice_modules_that_are_not_served(tmp_path):
    editor = edited("gpt2")
    export_lora(change_of(editor), tmp_path / "adapter", rank=4)
    with pytest.raises(AssertionError, match="expected target modules"):
        check_vllm(tmp_path / "adapter", editor.model, 8)
    alone = edited(modules=["model.layers.1.mlp.up_proj"])
    export_lora(change_of(alone), tmp_path / "alone", rank=4)
    with pytest.raises(AssertionError, match="up_proj without gate_proj"):
        check_sglang(tmp_path / "alone", alone.model)
