"""Tiny models that a trunk cache must not take at its word: where weights lie, what dtype they have, what layers do."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate import dispatch_model
from torch import nn

from support.tiny import VOCABULARY, tiny_model

__all__ = ["UNUSUAL", "unusual_model"]

DOWN = "model.layers.[12].mlp.down_proj"


def parameter_without_dimension(_directory: Path) -> nn.Module:
    model = tiny_model("llama")
    model.model.layers[0].register_parameter("gain", nn.Parameter(torch.tensor(0.5)))
    return model


def float32_norms(_directory: Path) -> nn.Module:
    model = tiny_model("gpt2", torch.bfloat16)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def offloaded(directory: Path) -> nn.Module:
    """Embeddings and the first layer on disk, fetched by accelerate when they run."""
    places = {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(tiny_model("llama"), places, main_device="cpu", offload_dir=directory, force_hooks=True)


def offloaded_above(directory: Path) -> nn.Module:
    """The layer above the edited ones, and the head, in host memory, fetched by accelerate when they run."""
    model = tiny_model("llama")
    model.model.layers.append(tiny_model("llama", seed=1).model.layers[2])
    model.model.layers[3].self_attn.layer_idx = 3  # its place in the cache of keys and values
    model.config.num_hidden_layers = 4
    model.config.layer_types = None
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "disk" if layer == 3 else "cpu" for layer in range(4)}
    return dispatch_model(model, places, main_device="cpu", offload_dir=directory, force_hooks=True)


def four_streams(_directory: Path) -> nn.Module:
    """Gemma 3n, whose layers hand on ``[4, batch, length, d]``."""
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=16,
        hidden_size_per_layer_input=8,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 3,
        activation_sparsity_pattern=[0.0] * 3,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.Gemma3nForCausalLM(config).eval()


def list_of_states(_directory: Path) -> nn.Module:
    """OpenAI's first GPT, whose layers return a list."""
    config = transformers.OpenAIGPTConfig(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=3, n_head=2)
    torch.manual_seed(0)
    return transformers.OpenAIGPTLMHeadModel(config).eval()


def state_beside_the_states(_directory: Path) -> nn.Module:
    """The last layer also reads what the first one's MLP has left behind."""
    model = tiny_model("llama")
    left: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: left.append(output))
    model.model.layers[2].register_forward_pre_hook(
        lambda _module, args, kwargs: ((args[0] + left[-1], *args[1:]), kwargs), with_kwargs=True
    )
    return model


# name -> (builder, pattern of the modules to edit, whether a trunk cache can serve it)
UNUSUAL = {
    "parameter without dimension": (parameter_without_dimension, DOWN, True),
    "float32 norms": (float32_norms, "transformer.h.[12].mlp.c_proj", True),
    "offloaded": (offloaded, DOWN, True),
    "offloaded above": (offloaded_above, DOWN, True),
    "four streams": (four_streams, DOWN, False),
    "list of states": (list_of_states, "transformer.h.[12].mlp.c_proj", False),
    "state beside the states": (state_beside_the_states, DOWN, False),
}


def unusual_model(name: str, directory: Path) -> tuple[nn.Module, str]:
    """The model, in evaluation mode, and a pattern of its modules to edit, above its first layer."""
    build, pattern, _ = UNUSUAL[name]
    return build(directory), pattern
