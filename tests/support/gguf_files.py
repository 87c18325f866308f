"""Tiny GGUF files of architectures that are not exported, named and shaped as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from stableedit_cpp.export.llama_cpp.vocabulary import write_vocabulary
from support.vocabularies import byte_level

_VOCABULARY = 400
_FIELDS = {
    "bloom": {
        **{"context_length": 256, "embedding_length": 64, "block_count": 2},
        **{"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5},
    },
    "falcon": {
        **{"context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 256},
        **{"attention.head_count": 4, "attention.head_count_kv": 1},
    },
    "lfm2": {
        **{"context_length": 256, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2},
        **{"attention.head_count": 4, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
        **{"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4},
    },
    "qwen35": {
        **{"context_length": 256, "embedding_length": 64, "feed_forward_length": 96, "block_count": 2},
        **{"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32},
        **{"full_attention_interval": 2, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e4},
        **{"rope.dimension_count": 8, "rope.dimension_sections": [2, 1, 1, 0]},
        **{"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4},
        **{"ssm.inner_size": 64},
    },
}


def _bloom(b: str, layer: int) -> dict[str, tuple[int, ...]]:
    maps = {"attn_qkv": (192, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256)}
    norms = {"attn_norm": (64,), "ffn_norm": (64,)}
    biases = {f"{b}{name}.bias": shape[:1] for name, shape in (maps | norms).items()}
    return {f"{b}{name}.weight": shape for name, shape in (maps | norms).items()} | biases


def _falcon(b: str, layer: int) -> dict[str, tuple[int, ...]]:
    maps = {"attn_qkv": (96, 64), "attn_output": (64, 64), "ffn_up": (256, 64), "ffn_down": (64, 256)}
    return {f"{b}{name}.weight": shape for name, shape in (maps | {"attn_norm": (64,)}).items()} | {
        f"{b}attn_norm.bias": (64,)
    }


def _mlp(b: str) -> dict[str, tuple[int, ...]]:
    return {f"{b}ffn_gate.weight": (96, 64), f"{b}ffn_up.weight": (96, 64), f"{b}ffn_down.weight": (64, 96)}


def _lfm2(b: str, layer: int) -> dict[str, tuple[int, ...]]:
    own = {"attn_norm": (64,), "ffn_norm": (64,)}
    if layer == 0:
        own |= {"shortconv.conv": (64, 3), "shortconv.in_proj": (192, 64), "shortconv.out_proj": (64, 64)}
    else:
        own |= {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
        own |= {"attn_q_norm": (16,), "attn_k_norm": (16,)}
    return _mlp(b) | {f"{b}{name}.weight": shape for name, shape in own.items()}


def _qwen35(b: str, layer: int) -> dict[str, tuple[int, ...]]:
    own = {"attn_norm": (64,), "post_attention_norm": (64,)}
    if layer == 1:
        own |= {"attn_q": (256, 64), "attn_k": (64, 64), "attn_v": (64, 64), "attn_output": (64, 128)}
        own |= {"attn_q_norm": (32,), "attn_k_norm": (32,)}
        return _mlp(b) | {f"{b}{name}.weight": shape for name, shape in own.items()}
    own |= {"attn_qkv": (128, 64), "attn_gate": (64, 64), "ssm_alpha": (4, 64), "ssm_beta": (4, 64)}
    own |= {"ssm_conv1d": (128, 4), "ssm_norm": (16,), "ssm_out": (64, 64)}
    tensors = _mlp(b) | {f"{b}{name}.weight": shape for name, shape in own.items()}
    return tensors | {f"{b}ssm_a": (4,), f"{b}ssm_dt.bias": (4,)}


_LAYERS = {"bloom": _bloom, "falcon": _falcon, "lfm2": _lfm2, "qwen35": _qwen35}
_NORMS = {
    "bloom": ("token_embd_norm.weight", "token_embd_norm.bias", "output_norm.weight", "output_norm.bias"),
    "falcon": ("output_norm.weight", "output_norm.bias"),
    "lfm2": ("token_embd_norm.weight",),
    "qwen35": ("output_norm.weight",),
}


def write_tiny_gguf(path: Path, architecture: str) -> None:
    """Of random weights, two layers, matrices in blocks of 8 bits; the output layer is the embedding."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path=None, arch=architecture)
    writer.add_name("tiny")
    for name, value in _FIELDS[architecture].items():
        kind = {list: "array", float: "float32", int: "uint32"}[type(value)]
        getattr(writer, f"add_{kind}")(f"{architecture}.{name}", value)
    write_vocabulary(writer, byte_level(), _VOCABULARY)
    shapes = {"token_embd.weight": (_VOCABULARY, 64)} | dict.fromkeys(_NORMS[architecture], (64,))
    for layer in range(2):
        shapes |= _LAYERS[architecture](f"blk.{layer}.", layer)
    of = gguf.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        tensor = random.normal(0, 0.2, shape).astype(np.float32)
        if name.endswith("ssm_a"):
            tensor = -np.abs(tensor)
        if len(shape) == 2 and shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(tensor, of), raw_dtype=of)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
