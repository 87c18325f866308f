"""Tiny models that accelerate has offloaded in every way it has; they run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

import stableedit_cpp as se
from support.tiny import save_tiny

CPU = torch.device("cpu")


def in_host_memory(model: nn.Module, _directory: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def on_disk(model: nn.Module, directory: Path) -> nn.Module:
    return disk_offload(model, directory / "offloaded", execution_device=CPU)


def half_on_disk(model: nn.Module, directory: Path) -> nn.Module:
    """The first two layers in memory, of the rest the weights on the disk."""
    names = [name for name, part in model.named_modules() if not list(part.children())]
    late = [name for name in names if ".2." in name or name == "lm_head"]
    places = {name: "disk" if name in late else "cpu" for name in names}
    return dispatch_model(model, places, main_device="cpu", offload_dir=directory / "offloaded", force_hooks=True)


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "host memory": in_host_memory,
    "disk": on_disk,
    "half on disk": half_on_disk,
}


def from_checkpoint(directory: Path, architecture: str = "llama", dtype: torch.dtype = torch.float32, **options):
    """(model, tokenizer) whose layers from 1 on stay in the checkpoint's own file."""
    saved = save_tiny(directory / "saved", architecture, dtype)
    names = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    places = {f"model.{name}": "disk" if name in ("layers.1", "layers.2") else "cpu" for name in names}
    return se.load_model(saved, device_map=places | {"lm_head": "disk"}, **options)
