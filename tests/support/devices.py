"""Tests that are one and the same on every device: on the CPU in every run, on CUDA where there is a card."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

on_devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            ],
        ),
    ],
)


def of_its_own(device: str) -> AbstractContextManager[object]:
    """A stream of its own for the work of this context, where the device has streams."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device == "cuda" else nullcontext()


def settled(device: str) -> None:
    """Wait until all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
