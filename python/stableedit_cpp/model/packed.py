"""Quantised models: the maps that are to be edited are made dense, all others stay packed as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from stableedit_cpp.model.packed_gradients import answers_to_unit_vectors, differentiates, lead_gradients_through
from stableedit_cpp.model.split import is_split

__all__ = ["is_packed", "keep_layout", "packed_again", "packed_kind", "packed_maps", "unpack", "unpacked"]

# What the quantisation configs of transformers call the maps that are left as they are.
_LEFT_OUT = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear map whose weight is not a matrix of numbers: of bitsandbytes (8 and 4 bits), torchao, or
    any other that says its ``in_features`` and ``out_features``."""
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return weight is None and any(True for _ in module.buffers(recurse=False))
    if is_split(weight):
        return False
    return type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.element_size() < 2


def packed_kind(module: nn.Module) -> str:
    """What its weight is: a dtype, or a class of some library."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return type(module).__name__
    return str(weight.dtype) if type(weight.data) is torch.Tensor else type(weight.data).__name__


def packed_maps(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Those of some modules of a model, by name, that are packed; names that it does not have are left out."""
    wanted = set(names)
    return {name: module for name, module in model.named_modules() if name in wanted and is_packed(module)}


def unpack(model: nn.Module, maps: Mapping[str, nn.Module]) -> list[str]:
    """Put a plain ``nn.Linear`` in place of each packed one of some maps of the model, by name.

    Its weight is what the packed one does to unit vectors, so that any library's format will do: exactly what is
    multiplied with where weights alone are quantised, and in the 8 bits of bitsandbytes, too, where a unit vector loses
    nothing. It has the dtype of the model's other weights. The model's quantisation config says from then on which maps
    are dense, so that it is saved and loaded as it is. Gradients pass the maps that stay packed, whether their library
    has a derivative or not.

    Returns:
        The names of those that were packed.

    Raises:
        ValueError: if a map does not answer with finite numbers; as ``keep_layout``.
    """
    keep_layout(model)
    packed = {name: module for name, module in maps.items() if is_packed(module)}
    dense = {name: _dense(name, module, _dtype(model)) for name, module in packed.items()}  # all, or none
    for name, linear in dense.items():
        model.set_submodule(name, linear)
    if dense:
        _say_so(model)
    _let_gradients_pass(model)
    return list(packed)


@contextmanager
def unpacked(model: nn.Module, maps: Mapping[str, nn.Module]) -> Iterator[None]:
    """``unpack``, and packed again as before where what follows raises."""
    with packed_again(model):
        unpack(model, maps)
        yield


@contextmanager
def packed_again(model: nn.Module) -> Iterator[None]:
    """All maps that are packed now are so again where what follows raises."""
    packed = {name: module for name, module in model.named_modules() if is_packed(module)}
    config, field = _left_out(model)
    before = None if field is None else getattr(config, field)
    try:
        yield
    except BaseException:
        for name, module in packed.items():
            model.set_submodule(name, module)
        if field is not None:
            setattr(config, field, before)
        raise


def keep_layout(model: nn.Module) -> None:
    """Let the 4 bits of bitsandbytes lie as they were loaded.

    On a CPU its first forward pass without gradients lays them out anew, and ``state_dict()`` puts them back, but not
    the scales beside them (0.50): a model that has answered once, and is saved or looked at, is another.

    Raises:
        ValueError: if that has happened.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"{name}: bitsandbytes has laid its 4 bits out for this CPU, and cannot save them from there; load "
                    "the model anew and edit it before anything else runs it, or load it with load_model"
                )
            module.support_avx512bf16_for_cpu = False


def _dtype(model: nn.Module) -> torch.dtype:
    """Of the weights that are not packed."""
    found = (parameter.dtype for parameter in model.parameters() if type(parameter.data) is torch.Tensor)
    return next((dtype for dtype in found if dtype.is_floating_point and dtype.itemsize >= 2), torch.float32)


def _let_gradients_pass(model: nn.Module) -> None:
    known: dict[tuple, bool] = {}  # one of a kind is asked
    for module in model.modules():
        if is_packed(module):
            kind = (type(module), packed_kind(module))
            if kind not in known:
                known[kind] = differentiates(module, torch.empty(0, device=_device(module), dtype=_dtype(model)))
            if not known[kind]:
                lead_gradients_through(module)


def _device(module: nn.Module) -> torch.device:
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


@torch.no_grad()
def _dense(name: str, module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    k, v = module.in_features, module.out_features
    bias = getattr(module, "bias", None)
    linear = nn.Linear(k, v, bias=bias is not None, device=_device(module), dtype=dtype).train(module.training)
    try:
        for first, answers in answers_to_unit_vectors(module, linear.weight):
            linear.weight[:, first : first + len(answers)] = answers.T
    except Exception as error:  # of whatever library, or of none: a plain map of integers multiplies with nothing
        raise ValueError(
            f"{name} has quantised weights ({packed_kind(module)}) and answers no unit vectors "
            f"({type(error).__name__}: {error!s:.120}); load the model in float32, bfloat16 or float16 to edit it"
        ) from error
    if bias is not None:
        linear.bias.copy_(bias)
    if not linear.weight.isfinite().all():
        raise ValueError(
            f"{name} has quantised weights ({packed_kind(module)}) that are not all finite; load the model in float32, "
            "bfloat16 or float16 to edit it"
        )
    return linear.requires_grad_(False)


def _say_so(model: nn.Module) -> None:
    """In the config, by name all linear maps that are dense, these and those that always were."""
    config, field = _left_out(model)
    if field is not None:
        dense = [n for n, part in model.named_modules() if isinstance(part, nn.Linear) and not is_packed(part)]
        setattr(config, field, dense)


def _left_out(model: nn.Module) -> tuple[object, str | None]:
    """The quantisation config, and where it has names of dense maps; None for that where it has no such place."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config, next((field for field in _LEFT_OUT if hasattr(config, field)), None)
