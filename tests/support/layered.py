"""Tiny random models of many layers, plain and with experts."""

from __future__ import annotations

import torch
import transformers

from support.tiny import VOCABULARY

__all__ = ["llama", "mixture"]

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": VOCABULARY, "max_position_embeddings": 512}


def llama(layers: int = 6) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model.eval()


def mixture(dense: list[int]) -> torch.nn.Module:
    """Experts that are no linear maps, and MLPs in some layers."""
    torch.manual_seed(0)
    sizes = SIZES | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    made = transformers.Qwen3MoeConfig(num_hidden_layers=6, mlp_only_layers=dense, **sizes)
    return transformers.Qwen3MoeForCausalLM(made).eval()
