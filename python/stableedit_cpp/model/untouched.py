"""A model in evaluation mode, without gradients for its parameters and with faster linear maps, for a while."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

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
        for parameter in [parameter for parameter in model.parameters() if parameter.requires_grad]:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        linears = Linears()
        stack.enter_context(linears.replaced(model))
        yield linears


def input_device(model: nn.Module) -> torch.device:
    """Where the model expects its token ids."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: accelerate fetches the weights to where it runs the module
        hook = getattr(embeddings, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return device
