"""Linear maps while we capture or evaluate: the same products and derivatives, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stableedit_cpp.model import linears
from stableedit_cpp.model.linears import Linears
from stableedit_cpp.model.tokens import TokenSequence, collate


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(37, 53).requires_grad_(False)


def reference(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return hidden.double() @ linear.weight.double().T + linear.bias.double()


@pytest.mark.parametrize("shape", [(37,), (1, 37), (5, 37), (2, 3, 37), (0, 37)])
def test_equals_the_product_in_float64(linear: nn.Linear, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(shape)
    with Linears().replaced(linear), torch.inference_mode():
        output = linear(hidden)
    assert output.shape == (*shape[:-1], 53)
    torch.testing.assert_close(output.double(), reference(linear, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not linears._onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 32, 37), (5, 13, 37), (3, 64, 37)])
def test_few_shapes(linear: nn.Linear, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, multiply = [], linears._by_onednn
    monkeypatch.setattr(linears, "_by_onednn", lambda x, *rest: rows.append(len(x)) or multiply(x, *rest))
    hidden = torch.randn(shape)
    with Linears().replaced(linear), torch.inference_mode(), linears.few_shapes():
        output = linear(hidden)
    assert output.shape == (*shape[:-1], 53) and rows == [-(-hidden.numel() // 37 // 64) * 64]
    torch.testing.assert_close(output.double(), reference(linear, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_derivative_equals_that_in_float64(bias: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(19, 31, bias=bias), nn.SiLU(), nn.Linear(31, 7, bias=bias)).requires_grad_(False)
    hidden = torch.randn(3, 4, 19, requires_grad=True)
    with Linears().replaced(model):
        (got,) = torch.autograd.grad(model(hidden).square().sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(model.double()(exact).square().sum(), exact)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_hooks_still_see_inputs_and_outputs(linear: nn.Linear) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    linear.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0], output)))
    hidden = torch.randn(2, 37)
    with Linears().replaced(linear):
        output = linear(hidden)
    assert seen[0][0] is hidden and seen[0][1] is output


def test_the_forward_comes_back_also_after_an_error(linear: nn.Linear) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), Linears().replaced(linear):
        assert "forward" in linear.__dict__
        raise RuntimeError("on purpose")
    assert "forward" not in linear.__dict__


def test_leaves_other_modules_alone(linear: nn.Linear) -> None:
    class Special(nn.Linear):
        pass

    def own(hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    special, wrapped = Special(3, 3), nn.Linear(3, 3)
    wrapped.forward = own
    with Linears().replaced(nn.ModuleList([linear, special, wrapped])):
        assert "forward" in linear.__dict__ and "forward" not in special.__dict__
        assert wrapped.forward is own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs_own(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    linear, hidden = nn.Linear(8, 5, dtype=dtype).requires_grad_(False), torch.randn(4, 8, dtype=dtype)
    expected = linear(hidden)
    with Linears().replaced(linear):
        assert torch.equal(linear(hidden), expected)


def test_the_same_without_onednn(linear: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stableedit_cpp.model.linears._onednn", lambda: False)
    hidden = torch.randn(5, 37)
    expected = linear(hidden)
    with Linears().replaced(linear):
        assert torch.equal(linear(hidden), expected)


def test_gradients_at_answer_positions_alone() -> None:
    """Two sequences, 3 and 4 tokens, with answers of 1 and 2: flat positions 2, 6 and 7 of a [2, 4] batch."""
    torch.manual_seed(3)
    linear = nn.Linear(6, 5).requires_grad_(False)
    batch = collate([TokenSequence((1, 2, 3), (9,)), TokenSequence((1, 2, 3, 4), (8, 9))], torch.device("cpu"))
    hidden = torch.randn(2, 4, 6, requires_grad=True)
    upstream = torch.randn(2, 4, 5)
    own = Linears()
    own.gradients_for(batch)
    with own.replaced(linear):
        (got,) = torch.autograd.grad(linear(hidden), hidden, upstream)
    full = (upstream.double() @ linear.weight.double()).view(8, 6)
    chosen = torch.tensor([2, 6, 7])
    assert torch.equal(batch.positions, chosen)
    torch.testing.assert_close(got.view(8, 6)[chosen].double(), full[chosen], rtol=1e-5, atol=1e-6)
    rest = torch.tensor([0, 1, 3, 4, 5])
    assert not got.view(8, 6)[rest].any()


def test_rows_of_another_shape_get_their_whole_gradient() -> None:
    linear = nn.Linear(6, 5).requires_grad_(False)
    linears = Linears()
    linears.gradients_for(collate([TokenSequence((1, 2, 3), (9,))], torch.device("cpu")))
    hidden = torch.randn(3, 6, requires_grad=True)  # as some models hand over: tokens, not sequences
    with linears.replaced(linear):
        (got,) = torch.autograd.grad(linear(hidden).sum(), hidden)
    torch.testing.assert_close(got, linear.weight.sum(0).expand(3, 6), rtol=1e-5, atol=1e-6)
