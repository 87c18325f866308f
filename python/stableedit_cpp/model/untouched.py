"""A model in evaluation mode, without gradients for its parameters and with faster linear maps, for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stableedit_cpp.files.offloaded import execution_device
from stableedit_cpp.model.linears import Linears

__all__ = ["input_device", "untouched"]

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def untouched(model: nn.Module) -> Iterator[Linears]:
    """Evaluation mode, no gradients for parameters and faster linear maps, all put back afterwards.

    Threads: several may be in here with one model; they take turns. Another thread may run the model meanwhile, to
    serve: its calls go through the plain linear maps and meet none of our hooks. It does see evaluation mode and
    ``requires_grad`` off, so it must not train; and an edit changes one weight after the other, so a call during an
    edit may see some of a turn's weights changed and others not.

    A compiled model runs uncompiled in here: each replaced linear map would be a recompilation.
    """
    with ExitStack() as stack:
        stack.enter_context(_locks.setdefault(model, threading.RLock()))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in [module for module in model.modules() if module.training]:
            stack.callback(setattr, module, "training", True)
            module.training = False
        for module, name in _trainable(model):
            stack.callback(_ask_for_gradient, module, name, True)
            _ask_for_gradient(module, name, False)
        linears = Linears()
        stack.enter_context(linears.replaced(model))
        yield linears


def _trainable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of each parameter that requires a gradient: not the parameter itself, in whose place accelerate
    puts another one whenever an offloaded module runs."""
    found = [(module, name, part) for module in model.modules() for name, part in module._parameters.items()]
    return [(module, name) for module, name, part in found if part is not None and part.requires_grad]


def _ask_for_gradient(module: nn.Module, name: str, flag: bool) -> None:
    getattr(module, name).requires_grad_(flag)


def input_device(model: nn.Module) -> torch.device:
    """Where the model expects its token ids."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate fetches the weights to where it runs the module
        return execution_device(embeddings) or torch.device("cpu")
    return device
