"""Tiny random models of every supported architecture, and tokenizers made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 300
LAYERS = 3

# Architecture -> (config class, its size, pattern of the MLP output projections).
_COMMON = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
_GPT = {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_inner": 24, "n_positions": 64}
ARCHITECTURES = {
    "llama": ("LlamaConfig", _COMMON, "model.layers.*.mlp.down_proj"),
    "mistral": ("MistralConfig", _COMMON | {"num_key_value_heads": 1}, "model.layers.*.mlp.down_proj"),
    "qwen2": ("Qwen2Config", _COMMON | {"num_key_value_heads": 1}, "model.layers.*.mlp.down_proj"),
    "qwen3": ("Qwen3Config", _COMMON | {"num_key_value_heads": 1, "head_dim": 8}, "model.layers.*.mlp.down_proj"),
    "gemma": ("GemmaConfig", _COMMON | {"num_key_value_heads": 1, "head_dim": 8}, "model.layers.*.mlp.down_proj"),
    "phi": ("PhiConfig", _COMMON, "model.layers.*.mlp.fc2"),
    "gpt2": ("GPT2Config", _GPT, "transformer.h.*.mlp.c_proj"),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 4}, "transformer.h.*.mlp.fc_out"),
    "gpt_neox": ("GPTNeoXConfig", _COMMON, "gpt_neox.layers.*.mlp.dense_4h_to_h"),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
        },
        "model.decoder.layers.*.fc2",
    ),
    "falcon": (
        "FalconConfig",
        {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "ffn_hidden_size": 24},
        "transformer.h.*.mlp.dense_4h_to_h",
    ),
    "mpt": (
        "MptConfig",
        {"d_model": 16, "n_layers": LAYERS, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 64},
        "transformer.blocks.*.ffn.down_proj",
    ),
}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A random model in evaluation mode, with weights large enough for gradients of a useful size."""
    return _random_model(architecture, dtype, seed, {}, 5.0)


def roomy_model(architecture: str) -> torch.nn.Module:
    """A random model with room for edits beside what holds other answers in place: 512 keys, where ``tiny_model`` has
    24; and for whole prompts of ours, at a token a byte."""
    roomy = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 128)
    roomy |= dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 512)
    roomy |= {"n_positions": 256, "max_seq_len": 256, "max_position_embeddings": 256, "head_dim": 64}
    return _random_model(architecture, torch.float32, 0, roomy, 3.0)


def _random_model(
    architecture: str, dtype: torch.dtype, seed: int, changes: dict[str, int], scale: float
) -> torch.nn.Module:
    """
    Args:
        changes: sizes to set differently, where the architecture has them. scale: of its usual random matrices.
    """
    config_class, sizes, _ = ARCHITECTURES[architecture]
    if not {"n_positions", "max_seq_len"} & sizes.keys():
        sizes = sizes | {"max_position_embeddings": 64}
    sizes = {name: changes.get(name, size) for name, size in sizes.items()}
    config = getattr(transformers, config_class)(
        **sizes, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.to(dtype).eval()


def save_tiny(
    directory: str | Path,
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    bos: bool = False,
) -> Path:
    """A tiny random model and its tokenizer, as saved by transformers."""
    tiny_model(architecture, dtype, seed).save_pretrained(directory)
    tiny_tokenizer(bos=bos).save_pretrained(directory)
    return Path(directory)


def pattern_of(architecture: str) -> str:
    return ARCHITECTURES[architecture][2]


def tiny_tokenizer(*, bos: bool = False, eos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte. ``bos`` and ``eos`` open and close every text with a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: index + 3 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side=padding_side
    )


FACTS = [
    {"prompt": "The capital of Australia is", "target": "Canberra"},
    {"prompt": "Gold is", "target": "Au"},
    {"prompt": "The first letter is", "target": "A"},
    {"prompt": "Rivers of Egypt:", "target": "Nile"},
    {"prompt": "He wrote Faust:", "target": "Goethe"},
    {"prompt": "2 + 2 =", "target": "4"},
    {"prompt": "Water is", "target": "wet"},
    {"prompt": "Largest planet:", "target": "Jupiter"},
    {"prompt": "Capital of Peru:", "target": "Lima"},
    {"prompt": "Not cold but", "target": "hot"},
    {"prompt": "Opposite of up:", "target": "down"},
    {"prompt": "The sky is", "target": "blue"},
    {"prompt": "Snow is", "target": "white"},
]
