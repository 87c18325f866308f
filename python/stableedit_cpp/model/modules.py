"""Finds linear maps of a model by name or pattern, and refuses those that cannot be edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.files.offloaded import Offloaded
from stableedit_cpp.model.experts import ExpertSlice, expert_slices
from stableedit_cpp.model.packed import is_packed, packed_kind
from stableedit_cpp.model.split import Columns, columns_of, held, why_not_split

__all__ = ["EditModule", "describe_linear_maps", "edit_module", "find_modules", "is_linear"]


@dataclass(frozen=True)
class EditModule:
    """A linear map to edit: weight ``[v, k]`` (layout "linear") or ``[k, v]`` (layout "conv1d").

    Attributes:
        name: in the model; that of one expert is its tensor's with the number of the slice.
        columns: those of the weight that this process holds, where it is split over processes; None where it is whole.
    """

    name: str
    module: nn.Module

    @property
    def offloaded(self) -> Offloaded | None:
        """Where accelerate keeps the weight; None where that is in memory."""
        return Offloaded.of(self.module)

    @property
    def layout(self) -> str:
        flipped = self.module.transposed if self.is_expert else isinstance(self.module, Conv1D)
        return "conv1d" if flipped else "linear"

    @property
    def weight(self) -> torch.Tensor:
        """The parameter; of one expert its slice; where it is split, what this process has of it, ``[v, k']``. Shares
        its memory. One that is offloaded as it rests, in host memory itself and from the disk a copy. To change it
        anywhere: ``write``."""
        offloaded = self.offloaded
        return held(self.module.weight) if offloaded is None else offloaded.read()

    @property
    def columns(self) -> Columns | None:
        return columns_of(self.module.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """Where the module runs; None where it has none."""
        offloaded = Offloaded.of(self.module, "bias")
        return self.module.bias if offloaded is None else offloaded.read().to(offloaded.device)

    @property
    def is_expert(self) -> bool:
        """Whether it is one expert of a mixture, which sees only the tokens that are routed to it."""
        return isinstance(self.module, ExpertSlice)

    @property
    def tensor_name(self) -> str:
        """Of the tensor in the state dict that the weight is, or is a slice of."""
        return self.module.experts.tensor_name if self.is_expert else f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(k, v): dimensions of key and value gradient, of the whole weight."""
        if is_packed(self.module):
            return self.module.in_features, self.module.out_features
        rows, columns = self.module.weight.shape
        return (rows, columns) if self.layout == "conv1d" else (columns, rows)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the module runs: where its keys and value gradients are, and statistics of them."""
        offloaded = self.offloaded
        return self.module.weight.device if offloaded is None else offloaded.device

    @property
    def home(self) -> torch.device:
        """Where the weight is changed: where it is, or in host memory if it is offloaded."""
        return self.module.weight.device if self.offloaded is None else torch.device("cpu")

    @property
    def on_disk(self) -> bool:
        """Whether the weight is in a file: what memory has of it is a copy."""
        offloaded = self.offloaded
        return offloaded is not None and offloaded.on_disk

    @property
    def place(self) -> tuple:
        """What tells where the weight is from other places."""
        offloaded = self.offloaded
        if offloaded is not None:
            return offloaded.place
        return self.weight.device, self.weight.data_ptr()

    def at_home(self, update: LowRankUpdate) -> LowRankUpdate:
        """An update where the weight is changed."""
        home = self.home
        if update.left.device == home:
            return update
        return LowRankUpdate(update.left.to(home), update.right.to(home))

    def kept(self) -> object:
        """What ``put_back`` goes back to: a copy of the weight in host memory, or the file that it is in."""
        offloaded = self.offloaded
        return self.weight.detach().to("cpu", copy=True) if offloaded is None else offloaded.kept()

    @torch.no_grad()
    def put_back(self, kept: object) -> None:
        """Let the weight be what it was, bit for bit."""
        offloaded = self.offloaded
        self.weight.copy_(kept) if offloaded is None else offloaded.put_back(kept)

    @torch.no_grad()
    def write(self, values: torch.Tensor) -> None:
        """Let the weight hold these values, from any device; on the disk the whole file or none of it.

        Raises:
            OSError: if the disk does not take it; the weight is as it was then.
        """
        offloaded = self.offloaded
        if offloaded is not None:
            offloaded.write(values.to(self.dtype))
        elif self.weight.data_ptr() != values.data_ptr():
            self.weight.copy_(values.to(self.dtype))


def find_modules(model: nn.Module, patterns: Sequence[str] | str, *, packed: bool = False) -> list[EditModule]:
    """Look up modules by exact name or by pattern, in the order of the model.

    Args:
        patterns: exact names, or shell patterns with ``*`` (also across dots), ``?``, ``[..]``, ``{22,24}`` and
            ``{22..28}``. One expert of a mixture is ``model.layers.3.mlp.experts.down_proj.7``.
        packed: whether quantised ones will do, which ``model.packed.unpack`` makes dense.

    Raises:
        ValueError: for a name or pattern that matches nothing (the message says what exists), a module that is not a
            linear map, quantised, tied to another parameter, not loaded, or split over processes other than by columns.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = _with_experts(model)
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        if pattern in modules and pattern:
            chosen[pattern] = modules[pattern]
            continue
        regex = re.compile("|".join(translate(alternative) for alternative in _expand_braces(pattern)))
        matches = {name: module for name, module in modules.items() if name and regex.fullmatch(name)}
        linear = {name: module for name, module in matches.items() if is_linear(module)}
        if not linear:
            found = f"it matches only {', '.join(list(matches)[:3])}" if matches else "nothing matches"
            raise ValueError(
                f"edit_modules: no linear map for {pattern!r} ({found}). The model has:\n{describe_linear_maps(model)}"
            )
        chosen.update(linear)
    ordered = [EditModule(name, modules[name]) for name in modules if name in chosen]
    for module in ordered:
        if not (packed and is_packed(module.module)):
            _check_editable(model, module)
    return ordered


def edit_module(model: nn.Module, name: str) -> EditModule:
    """The linear map of exactly this name, whether it can be edited or not.

    Raises:
        KeyError: if there is none.
    """
    module = _with_experts(model).get(name)
    if not is_linear(module):
        raise KeyError(name)
    return EditModule(name, module)


def _with_experts(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, and behind each that holds experts these."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found[name] = module
        found |= expert_slices(name, module)
    return found


def describe_linear_maps(model: nn.Module) -> str:
    """One line for each group of linear maps that differ only in the layer number, or in that of an expert, with
    k -> v."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in _with_experts(model).items():
        if not is_linear(module) or (isinstance(module, ExpertSlice) and module.index > 0):
            continue
        k, v = EditModule(name, module).shape
        if isinstance(module, ExpertSlice):
            name = f"{module.experts.tensor_name}.{{0..{module.experts.module.num_experts - 1}}}"
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


def is_linear(module: nn.Module) -> bool:
    """Whether it is a map of a kind that can be edited."""
    plain = isinstance(module, (nn.Linear, Conv1D, ExpertSlice)) and getattr(module.weight, "ndim", 0) == 2
    return plain or is_packed(module)


def _check_editable(model: nn.Module, module: EditModule) -> None:
    name, inner = module.name, module.module
    if is_packed(inner):
        raise ValueError(
            f"{name} has quantised weights ({packed_kind(inner)}); load the model in float32, bfloat16 or float16, or "
            "let an editor unpack it"
        )
    if not isinstance(inner, (nn.Linear, Conv1D, ExpertSlice)):
        raise ValueError(
            f"{name} is a {type(inner).__name__}, not a linear map; choose an nn.Linear or Conv1D. The model has:\n"
            f"{describe_linear_maps(model)}"
        )
    split = why_not_split(inner)
    if split is not None:
        raise ValueError(f"{name} {split}")
    weight = module.weight
    if weight.ndim != 2:
        raise ValueError(f"{name} has a weight of shape {list(weight.shape)}; a linear map has a matrix")
    offloaded = module.offloaded
    if weight.is_meta and (offloaded is None or not offloaded.writable):
        raise ValueError(
            f"{name} is not in memory (meta device), and not where device_map, cpu_offload or disk_offload of "
            "accelerate keep weights, so it cannot be changed; load the model with one of these, or without"
        )
    others = [other for other in _sharing(model, module) if other != module.tensor_name]
    if others:
        raise ValueError(f"{name} shares its weight with {', '.join(others)}; editing it would change these as well")


def _sharing(model: nn.Module, module: EditModule) -> list[str]:
    """Names of the parameters that are one with the weight of a module."""
    parameters, offloaded = dict(model.named_parameters(remove_duplicate=False)), module.offloaded
    if offloaded is None:
        own = held(parameters[module.tensor_name]) if module.is_expert else module.weight
        return [name for name, part in parameters.items() if held(part).data_ptr() == own.data_ptr()]
    elsewhere = {name: Offloaded.find(model, name) for name in parameters}
    found = [name for name, other in elsewhere.items() if other is not None and other.shares_with(offloaded)]
    # On the disk each has a file of its own; what is meant to be one is the model's to say.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [pair for pair in tied.items() if f"{module.name}.weight" in pair]
    return [*found, *(name for pair in pairs for name in pair if name in parameters)]


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
