"""Models and requests that several benchmarks run on."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
import transformers

from common import data_file
from stableedit_cpp import StableEditConfig, load_model, read_requests
from stableedit_cpp.model.form import RAW, Form
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.outputs import default_edit_modules
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize

# Random-weight models by name; --config also takes a file with such a dictionary.
_LLAMA = {"model_type": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768}
_MISTRAL = {"model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336}
# The shapes of Llama 3.2's small ones, whose embeddings are tied.
_LLAMA_3 = _LLAMA | {"vocab_size": 128256, "intermediate_size": 8192, "num_key_value_heads": 8}
_LLAMA_3 |= {"tie_word_embeddings": True}
CONFIGS = {
    "tiny": _LLAMA | {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 4},
    "wide": _LLAMA | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8},
    "llama-1.2b": _LLAMA_3 | {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "llama-3b": _LLAMA_3 | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
    "mistral-7b": _MISTRAL | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "mistral-7b-8-layers": _MISTRAL | {"num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model (default smollm2-135m)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--edit-modules", nargs="+", metavar="NAME", help="default: four in the last third")
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    default = StableEditConfig.max_tokens_per_forward
    parser.add_argument(
        "--max-tokens", type=int, default=default, metavar="N", help="in one forward pass (default %(default)s)"
    )


def pretrained(options: argparse.Namespace, device: torch.device) -> tuple[torch.nn.Module, object, list[EditModule]]:
    model, tokenizer = load_model(options.model, device=device, dtype=getattr(torch, options.dtype))
    return model, tokenizer, edited(model, options)


def random_model(name: str, options: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """A model of a config from CONFIGS or a JSON file; the weights are random."""
    fields = CONFIGS[name] if name in CONFIGS else json.loads(Path(name).read_text(encoding="utf-8"))
    config = transformers.AutoConfig.for_model(**fields)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()


def edited(model: torch.nn.Module, options: argparse.Namespace) -> list[EditModule]:
    return find_modules(model, options.edit_modules or default_edit_modules(model))


def zsre(options: argparse.Namespace, count: int, part: str = "edit") -> list:
    """The first requests of ZsRE; ``part`` is "edit" or "train" (for the warm-up)."""
    return read_requests(data_file(options.data, f"zsre/zsre_{part}_5k.json"), count)


def token_sequences(model: torch.nn.Module, tokenizer, requests: list, form: Form = RAW) -> list[TokenSequence]:
    names = [str(index) for index in range(len(requests))]
    return tokenize(tokenizer, [(r.prompt, r.target) for r in requests], context_length(model), names, form)


def random_sequences(count: int, vocabulary: int) -> list[TokenSequence]:
    """Random tokens with about the lengths of ZsRE: prompts of 8 to 20 tokens, answers of 1 to 6."""
    source = random.Random(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(source.randrange(vocabulary) for _ in range(source.randint(low, high)))

    sequences = []
    for _ in range(count):
        answer = tokens(1, 6)
        sequences.append(TokenSequence(tokens(8, 20) + answer[:-1], answer))
    return sequences
