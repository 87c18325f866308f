"""Architectures of transformers, each as a tiny random model: a new one is one line.

The key is the name of its config class without "Config"; what the line adds to ``SIZE`` is what that class needs to be
small. Those with ``TOWER`` or another vision tower are wrappers around a language model; see ``MULTIMODAL``.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

from support.tiny import VOCABULARY

__all__ = ["ARCHITECTURES", "LAYERS", "MULTIMODAL", "build", "config_of"]

LAYERS = 6
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZE |= {"intermediate_size": 24, "max_position_embeddings": 64, "tie_word_embeddings": False}
SIZE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KV = {"num_key_value_heads": 1, "head_dim": 8}
MOE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
GROUPS = MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 2}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 32}
SSM |= {"mamba_chunk_size": 16}
DELTA = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MIXED = {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}
STREAMS = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
FULL = {"layer_types": ["full_attention"] * LAYERS}

ARCHITECTURES: dict[str, dict[str, object]] = {
    "Apertus": KV,
    "Bamba": KV | SSM | {"attn_layer_indices": [1, 3, 5]},
    "BioGpt": {},
    "BitNet": KV,
    "Bloom": {},
    "CodeGen": {"rotary_dim": 4, "num_attention_heads": 4},
    "Cohere": KV,
    "Cohere2": KV,
    "DeepseekV2": LATENT | GROUPS | {"first_k_dense_replace": 1},
    "DeepseekV3": LATENT | GROUPS | {"first_k_dense_replace": 1},
    "Ernie4_5": KV,
    "Ernie4_5_Moe": KV | MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "Exaone4": KV,
    "Falcon": {},
    "FalconH1": KV | SSM,
    "FalconMamba": {"state_size": 4, "time_step_rank": 4},
    "FlexOlmo": KV | {"num_experts": 4, "num_experts_per_tok": 2},
    "Gemma": KV,
    "Gemma2": KV,
    "Gemma3Text": KV,
    "Gemma3nText": KV | STREAMS | FULL | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * LAYERS},
    "Gemma4Text": KV | STREAMS | FULL,
    "Glm": KV,
    "Glm4": KV,
    "Glm4Moe": KV | GROUPS | {"first_k_dense_replace": 1},
    "GPT2": {},
    "GPTBigCode": {},
    "GPTJ": {"rotary_dim": 4},
    "GPTNeo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "GPTNeoX": {},
    "GptOss": KV | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": KV,
    "GraniteMoe": KV | {"num_local_experts": 4},
    "GraniteMoeShared": KV | {"num_local_experts": 4, "shared_intermediate_size": 24},
    "Helium": KV,
    "Jamba": {"use_mamba_kernels": False, "num_key_value_heads": 1, "num_experts": 2, "mamba_dt_rank": 4}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "JetMoe": {"kv_channels": 8, "num_key_value_heads": 1, "num_local_experts": 4},
    "Lfm2": MIXED | {"block_ff_dim": 24, "block_auto_adjust_ff_dim": False, "num_key_value_heads": 1},
    "Lfm2Moe": KV | MOE | MIXED | {"num_experts": 4, "num_dense_layers": 1},
    "Llama": {},
    "Llama4Text": KV | {"num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    "Mamba": {"state_size": 4, "time_step_rank": 4},
    "Mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "MiniMax": KV | {"num_local_experts": 4, "block_size": 16},
    "Mistral": KV,
    "Mixtral": KV | {"num_local_experts": 4},
    "Mpt": {"d_model": 16, "n_layers": LAYERS, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2},
    "Nemotron": KV,
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {},
    "Olmoe": KV | {"num_experts": 4, "num_experts_per_tok": 2},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Persimmon": {},
    "Phi": {},
    "Phi3": {},
    "Phimoe": KV | {"num_local_experts": 4},
    "Qwen2": KV,
    "Qwen2Moe": KV | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "Qwen3": KV,
    "Qwen3_5Text": KV | DELTA,
    "Qwen3Moe": KV | MOE | {"num_experts": 4},
    "Qwen3Next": KV | MOE | DELTA | {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "RecurrentGemma": {"num_key_value_heads": 1, "lru_width": 16, "attention_window_size": 64},
    "Rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "SeedOss": KV,
    "SmolLM3": KV,
    "StableLm": {"num_key_value_heads": 2},
    "Starcoder2": KV,
    "XGLM": {"d_model": 16, "num_layers": LAYERS, "attention_heads": 2, "ffn_dim": 24},
    "Zamba2": {"n_mamba_heads": 4, "mamba_ngroups": 1, "layer_types": ["mamba", "hybrid"] * (LAYERS // 2)}
    | {"hybrid_layer_ids": [1, 3, 5], "tie_word_embeddings": True},
}

# Of these, what lies in text_config and in vision_config; the tower has more layers than the language model, as wide.
TOWER = {"hidden_size": 16, "num_hidden_layers": 9, "num_attention_heads": 2, "intermediate_size": 24}
TOWER |= {"image_size": 8, "patch_size": 4}
QWEN_TOWER = {"depth": 9, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 24}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}

MULTIMODAL: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "Gemma3": ({}, TOWER),
    "Glm4v": (MROPE, QWEN_TOWER),
    "Idefics3": ({"model_type": "llama"}, TOWER),
    "InternVL": ({"model_type": "qwen2"}, TOWER | {"image_size": [8, 8], "patch_size": [4, 4]}),
    "Llama4": (
        {"num_local_experts": 4, "intermediate_size_mlp": 24},
        TOWER | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "Llava": ({"model_type": "llama"}, TOWER | {"model_type": "clip_vision_model"}),
    "Mistral3": ({"model_type": "mistral"}, TOWER | {"model_type": "pixtral", "head_dim": 8}),
    "Mllama": (
        {"cross_attention_layers": [1]},
        TOWER | {"num_global_layers": 1, "vision_output_dim": 16, "intermediate_layers_indices": [0]},
    ),
    "PaliGemma": ({"model_type": "gemma"}, TOWER | {"model_type": "siglip_vision_model", "projection_dim": 16}),
    "Qwen2VL": (MROPE, {"depth": 9, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}),
    "Qwen2_5_VL": (MROPE, QWEN_TOWER),
    "Qwen3VL": (
        {"rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}},
        QWEN_TOWER | {"deepstack_visual_indexes": [1]},
    ),
    "SmolVLM": ({"model_type": "llama"}, TOWER),
}


def config_of(name: str) -> transformers.PreTrainedConfig:
    """Config of a tiny model of the architecture."""
    config_class = getattr(transformers, f"{name}Config")
    if name in MULTIMODAL:
        text, vision = MULTIMODAL[name]
        return config_class(text_config=SIZE | KV | text, vision_config=vision)
    return config_class(**SIZE | ARCHITECTURES[name])


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny random model, in evaluation mode, with matrices large enough for gradients of a useful size."""
    auto = transformers.AutoModelForImageTextToText if name in MULTIMODAL else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config_of(name))
    with torch.no_grad():
        for part in model.parameters():
            if part.ndim >= 2:
                part.mul_(3.0)
    return model.to(dtype).eval()
