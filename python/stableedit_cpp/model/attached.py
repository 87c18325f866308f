"""What sits on a model for a while: hooks and replaced forwards, for the calls of one thread alone.

A model that is edited may serve at the same time. Whatever we attach to it acts in the thread that attached it; to
every other thread the module is the plain one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["beneath_hook", "for_this_thread", "forward_hook", "forward_pre_hook", "replaced_forward", "replacement"]


class _While:
    """Lives as long as the context that attached something: a signal that raises right after the attaching, or in the
    middle of the detaching, leaves it on the module, where it must not act any more."""


def for_this_thread(function: Callable, otherwise: Callable | None = None, *, during: _While | None = None) -> Callable:
    """The function, for calls from this thread, while ``during`` lives; all other calls go to ``otherwise``, or give
    None."""
    owner = threading.get_ident()
    alive = (lambda: True) if during is None else weakref.ref(during)

    def chosen(*args: object, **kwargs: object) -> object:
        if threading.get_ident() == owner and alive():
            return function(*args, **kwargs)
        return None if otherwise is None else otherwise(*args, **kwargs)

    chosen.alive, chosen.otherwise = alive, otherwise
    return chosen


def replacement(module: nn.Module) -> Callable | None:
    """The forward that somebody put in the place of the module's own; one of ours that was left behind is none, and is
    taken away."""
    found = module.__dict__.get("forward")
    if found is not None and not getattr(found, "alive", lambda: True)():
        module.__dict__.pop("forward", None)
        return None
    return found


def beneath_hook(module: nn.Module) -> Callable | None:
    """The forward that accelerate's hook calls, once it has fetched what is offloaded (``_old_forward``); None without
    a hook, or where somebody has put another forward over it. One of ours that was left behind is taken away."""
    outer, inner = replacement(module), getattr(module, "_old_forward", None)
    if inner is None or getattr(outer, "args", None) != (module,):
        return None
    while not getattr(inner, "alive", lambda: True)():
        inner = module._old_forward = inner.otherwise
    return inner


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable, seat: str = "forward") -> Iterator[None]:
    """Shadow a module's forward for a while; the module keeps its hooks and attributes, which the model looks at.

    Args:
        seat: the attribute that is called.
    """
    before, during = replacement(module) if seat == "forward" else getattr(module, seat), _While()
    setattr(module, seat, for_this_thread(forward, otherwise=getattr(module, seat), during=during))
    try:
        yield
    finally:
        if before is None:
            delattr(module, seat)
        else:
            setattr(module, seat, before)


@contextmanager
def forward_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    """``hook(module, args, output)`` after each forward of this thread; a result other than None takes the output's
    place."""
    during = _While()
    handle = module.register_forward_hook(for_this_thread(hook, during=during))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_pre_hook(module: nn.Module, hook: Callable) -> Iterator[None]:
    """``hook(module, args, kwargs)`` before each forward of this thread; a result other than None takes the place of
    both."""
    during = _While()
    handle = module.register_forward_pre_hook(for_this_thread(hook, during=during), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
