"""The server of cpp/examples/hot_edit_server with a tiny model: where it is, and what Python says that it serves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from stableedit_cpp import core
from stableedit_cpp.model.modules import find_modules
from support.tiny import tiny_model, tiny_tokenizer

__all__ = [
    "BUILD",
    "EXAMPLE",
    "MODULES",
    "PROMPTS",
    "ROOT",
    "SERVER_TESTS",
    "Refused",
    "Server",
    "answers",
    "export_model",
    "mutate",
    "patched_weights",
    "python_answers",
    "same_bits",
    "served_weights",
]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "cpp/examples/hot_edit_server"
sys.path.insert(0, str(EXAMPLE))
import export_model  # noqa: E402
import mutate  # noqa: E402
from client import Refused, Server  # noqa: E402

# Where `make test-cpp` builds; another place can be named.
BUILD = Path(os.environ.get("STABLEEDIT_BUILD_DIR", ROOT / "build/editable")) / "cpp/examples/hot_edit_server"
MODULES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
PROMPTS = ["The capital of Peru:", "Gold", "2 + 2 =", "Österreich, 日本", "x", "Snow is white and"]

SERVER_TESTS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUILD / "hot_edit_server").exists(),
        reason=f"no hot_edit_server in {BUILD}; `make test-cpp` builds it where its libraries are installed",
    ),
]


def patched_weights(patches: Path, names: str) -> dict[str, torch.Tensor]:
    """The weights with some patches, added one after the other in Python."""
    weights = {module.name: module.weight.detach() for module in find_modules(tiny_model("llama"), MODULES)}
    for name in names:
        patch = core.load_patch(patches / f"{name}.safetensors")
        patch.add_to({module: weights[module] for module in patch.modules})
    return weights


def python_answers(patches: Path, names: str, max_tokens: int) -> list[list[int]]:
    """Greedy answers of the model in Python, with some patches."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for name, weight in patched_weights(patches, names).items():
        model.get_submodule(name).weight.data.copy_(weight)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            full = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
        answers.append([token for token in full.tolist() if token != model.config.eos_token_id])
    return answers


def answers(server: Server, max_tokens: int = 8) -> list[list[int]]:
    return [server.generate(prompt, max_tokens)["tokens"] for prompt in PROMPTS]


def served_weights(server: Server) -> dict[str, torch.Tensor]:
    weights = {}
    for module in MODULES:
        tensors, _ = core.parse_safetensors(server.weight(module))
        weights[module] = tensors[f"{module}.weight"]
    return weights


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in MODULES)
