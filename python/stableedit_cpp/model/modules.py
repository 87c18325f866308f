"""Finds the linear maps of a model that can be edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["EditModule", "default_edit_modules", "describe_linear_maps", "find_modules"]

# Where in the depth of the model the default modules lie: layers 22, 24, 26, 28 of 30.
_DEFAULT_DEPTHS = (22 / 30, 24 / 30, 26 / 30, 28 / 30)


@dataclass(frozen=True)
class EditModule:
    """A linear map to edit: weight ``[v, k]`` (layout "linear") or ``[k, v]`` (layout "conv1d")."""

    name: str
    module: nn.Module

    @property
    def layout(self) -> str:
        return "conv1d" if isinstance(self.module, Conv1D) else "linear"

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(k, v): dimensions of key and value gradient."""
        rows, columns = self.weight.shape
        return (rows, columns) if self.layout == "conv1d" else (columns, rows)


def find_modules(model: nn.Module, patterns: Sequence[str] | str) -> list[EditModule]:
    """Look up modules by exact name or by pattern, in the order of the model.

    Args:
        patterns: exact names, or shell patterns with ``*`` (also across dots), ``?``, ``[..]``, ``{22,24}`` and
            ``{22..28}``.

    Raises:
        ValueError: for a name or pattern that matches nothing (the message says what exists), a module that is not a
            linear map, quantised, tied to another parameter, or not loaded.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = dict(model.named_modules())
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        if pattern in modules and pattern:
            chosen[pattern] = modules[pattern]
            continue
        regex = re.compile("|".join(translate(alternative) for alternative in _expand_braces(pattern)))
        matches = {name: module for name, module in modules.items() if name and regex.fullmatch(name)}
        linear = {name: module for name, module in matches.items() if _is_linear(module)}
        if not linear:
            found = f"it matches only {', '.join(list(matches)[:3])}" if matches else "nothing matches"
            raise ValueError(
                f"edit_modules: no linear map for {pattern!r} ({found}). The model has:\n{describe_linear_maps(model)}"
            )
        chosen.update(linear)
    ordered = [EditModule(name, modules[name]) for name in modules if name in chosen]
    for module in ordered:
        _check_editable(model, module)
    return ordered


def default_edit_modules(model: nn.Module, *, every: bool = False) -> list[str]:
    """Names of the MLP output projections of four layers in the last third of the language model, or of ``every`` layer
    there but the last.

    They are found by their shape, not by their name (see ``_mlp_output``), in the layers of the text decoder alone. In
    a mixture of experts it is the expert that sees every token, if there is one.

    Raises:
        ValueError: for an architecture where at most a third of the layers hold such an MLP (the message says what
            exists).
    """
    count, width = _text_size(model)
    found: dict[tuple, list[str]] = {}  # one entry for each place that has the shape of an MLP in a list of layers
    for name, layers in _layer_lists(model).items():
        places: dict[str, list[str]] = {}
        for index, layer in enumerate(layers):
            for place, block in layer.named_modules():
                output = _mlp_output(block)
                if output is not None and width in (None, EditModule(output, getattr(block, output)).shape[1]):
                    inside = f"{place}.{output}".lstrip(".")
                    places.setdefault(inside, []).append(f"{name}.{index}.{inside}")
        for inside, names in places.items():
            if 3 * len(names) > len(layers):
                # Adapters beside an MLP are of its shape, but narrower. The decoder comes after the encoder.
                inner = EditModule(inside, model.get_submodule(names[0])).shape[0]
                found[len(layers) == count, len(layers), inner, len(found)] = names
    if not found:
        raise ValueError(
            f"no default edit_modules are known for {type(model).__name__}; name them. The model has:\n"
            f"{describe_linear_maps(model)}"
        )
    names = found[max(found)]
    if every:
        begin = 2 * len(names) // 3
        return names[begin : max(begin + 1, len(names) - 1)]
    return list(dict.fromkeys(names[min(int(depth * len(names)), len(names) - 1)] for depth in _DEFAULT_DEPTHS))


def describe_linear_maps(model: nn.Module) -> str:
    """One line for each group of linear maps that differ only in the layer number, with k -> v."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not _is_linear(module):
            continue
        k, v = EditModule(name, module).shape
        match = re.search(r"\.(\d+)\.", name)
        pattern = f"{name[: match.start()]}.{{}}.{name[match.end() :]}" if match else name
        groups.setdefault((pattern, f"{k} -> {v}"), []).append(match.group(1) if match else "")
    lines = []
    for (pattern, shape), numbers in groups.items():
        if numbers != [""]:
            span = numbers[0] if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
            pattern = pattern.replace("{}", span)
        lines.append(f"    {pattern}  ({shape})")
    return "\n".join(lines) or "    no linear maps"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) and getattr(module.weight, "ndim", 0) == 2


def _text_size(model: nn.Module) -> tuple[int | None, int | None]:
    """Number of layers and width of the language model; None for what its config does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)


def _layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules by name: those of what the model calls its decoder, which leaves out a vision tower."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(part) for part in decoder.modules()}
    return {name: part for name, part in lists.items() if id(part) in inside} or lists


def _mlp_output(block: nn.Module) -> str | None:
    """Name of the linear map in a block that leads back to the width from which the others start; None if the block is
    no MLP.

    An MLP has one or two maps from width d to another width m (two with a gate, or one to 2m for both) and one from m
    back to d. Attention has other shapes: four maps, or one to 3d; and what has a convolution is a recurrent layer.
    """
    children = dict(block.named_children())
    maps = {name: EditModule(name, child).shape for name, child in children.items() if _is_linear(child)}
    if not 2 <= len(maps) <= 3 or any(isinstance(child, nn.Conv1d) for child in children.values()):
        return None
    for down, (m, d) in reversed(maps.items()):
        ups = [shape for name, shape in maps.items() if name != down]
        if m != d and (all(up == (d, m) for up in ups) or ups == [(d, 2 * m)]):
            return down
    return None


def _check_editable(model: nn.Module, module: EditModule) -> None:
    name, inner = module.name, module.module
    if not isinstance(inner, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{name} is a {type(inner).__name__}, not a linear map; choose an nn.Linear or Conv1D. The model has:\n"
            f"{describe_linear_maps(model)}"
        )
    weight = inner.weight
    plain = type(weight.data) is torch.Tensor
    if not plain or weight.ndim != 2 or not weight.is_floating_point() or weight.element_size() < 2:
        kind = str(weight.dtype) if plain else type(weight.data).__name__
        raise ValueError(
            f"{name} has quantised weights ({kind}); load the model in float32, bfloat16 or float16 to edit it"
        )
    if weight.is_meta:
        raise ValueError(f"{name} is not in memory (meta device); load the model so that this module is not offloaded")
    sharing = [n for n, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() == weight.data_ptr()]
    others = [n for n in sharing if n != f"{name}.weight"]
    if others:
        raise ValueError(f"{name} shares its weight with {', '.join(others)}; editing it would change these as well")


def _expand_braces(pattern: str) -> list[str]:
    """``{22,24}`` and ``{22..24}``, as a shell has them."""
    match = re.search(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    if not match:
        return [pattern]
    head, inner, tail = pattern[: match.start()], match.group(1), pattern[match.end() :]
    if "," in inner:
        options = inner.split(",")
    else:
        first, last = map(int, inner.split(".."))
        options = [str(number) for number in range(first, last + 1)]
    return [expanded for option in options for expanded in _expand_braces(head + option + tail)]
