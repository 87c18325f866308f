"""What sits on a model for a while, and what a signal may leave of it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from stableedit_cpp.model.attached import forward_hook, forward_pre_hook, replaced_forward, replacement


class Signal(BaseException):
    """What an application's handler raises."""


@pytest.mark.parametrize(
    "attach, where",
    [
        (lambda m: forward_hook(m, lambda *_: torch.zeros(1)), "register_forward_hook"),
        (lambda m: forward_pre_hook(m, lambda *_: ((torch.zeros(2),), {})), "register_forward_pre_hook"),
    ],
)
def test_a_hook_that_a_signal_left_behind_does_nothing(attach, where, monkeypatch):
    """It comes when the hook is on the module, and before anybody knows how to take it off."""
    module = nn.Linear(2, 1)
    expected = module(torch.ones(2))
    with attach(module):
        assert not torch.equal(module(torch.ones(2)), expected)
    real = getattr(nn.Linear, where)

    def interrupted(self, *args, **how):
        real(self, *args, **how)
        raise Signal

    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, where, interrupted)
        with pytest.raises(Signal), attach(module):
            pass
    gc.collect()
    assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 1
    assert torch.equal(module(torch.ones(2)), expected)


def test_a_replaced_forward_ends_with_its_context():
    module = nn.Linear(2, 1)
    expected = module(torch.ones(2))
    with replaced_forward(module, lambda _input: torch.zeros(1)):
        assert torch.equal(module(torch.ones(2)), torch.zeros(1))
    assert torch.equal(module(torch.ones(2)), expected) and "forward" not in vars(module)


def test_a_forward_that_a_signal_left_behind_is_none_of_the_modules(monkeypatch):
    """It is the plain one, and whoever looks finds it gone: else the module's products were of other bits for ever."""
    module = nn.Linear(2, 1)
    expected = module(torch.ones(2))

    def interrupted(self, name: str, value: object) -> None:
        super(nn.Linear, self).__setattr__(name, value)
        raise Signal

    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "__setattr__", interrupted)
        with pytest.raises(Signal), replaced_forward(module, lambda _input: torch.zeros(1)):
            pass
    gc.collect()
    assert "forward" in vars(module) and torch.equal(module(torch.ones(2)), expected)
    assert replacement(module) is None and "forward" not in vars(module)
    with replaced_forward(module, lambda _input: torch.zeros(1)):
        assert replacement(module) is not None
