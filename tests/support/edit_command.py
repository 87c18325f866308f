"""A model and a file of requests for `stableedit edit`, and what it made of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import stableedit_cpp as se
from support.tiny import FACTS, tiny_model, tiny_tokenizer

LAST = "model.layers.2.mlp.down_proj"
REQUESTS = [
    fact
    | {"id": f"f{i}", "rephrase": f"Say: {fact['prompt']}", "locality_prompt": "One, two,", "locality_target": "three"}
    for i, fact in enumerate(FACTS)
]
LONG = json.dumps([FACTS[0], {"prompt": "x" * 80, "target": "y", "id": "long"}])
NAMES = ["stableedit_cpp", "built against torch", "compiler", "torch", "cuda", "python", "system", "processor"]
NAMES += ["memory (GiB)", "transformers", "tokenizers", "safetensors", "numpy"]


def report_of(directory: str = "out") -> dict:
    return json.loads(Path(directory, "stableedit_report.json").read_text(encoding="utf-8"))


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def edited_by_hand(config: se.EditorConfig, requests=REQUESTS, warm_up=()) -> dict[str, torch.Tensor]:
    """The same edits through the Python interface."""
    model = tiny_model("llama")
    cls = se.StableEdit if isinstance(config, se.StableEditConfig) else se.UltraEdit
    editor = cls(model, tiny_tokenizer(bos=True), config)
    if warm_up:
        editor.warm_up(warm_up, progress=False)
    editor.edit(requests, progress=False)
    return model.state_dict()
