"""Patches in a file: both ways between C++ and Python, and whatever can be wrong with one."""

from __future__ import annotations

import pytest
import safetensors
import safetensors.torch
import torch

from stableedit_cpp import core
from support.containers import same

K, V, ROWS = 7, 5, 40


def example_patch() -> core.Patch:
    torch.manual_seed(0)
    return core.Patch(
        {
            "layers.0": core.WeightChange(core.LowRankUpdate(torch.randn(V, 2), torch.randn(2, K))),
            "layers.1": core.WeightChange(core.LowRankUpdate(torch.randn(V, 2), torch.randn(2, K)), "conv1d"),
            "layers.2": core.WeightChange(torch.randn(V, K)),
            "layers.3": core.WeightChange(torch.randn(V, K), "conv1d"),
        },
        id="capital",
        created="2026-01-02T03:04:05+0000",
        base_model="tiny",
        base_digest="blake2b:00",
        config="{}",
        requests='{"count": 1}',
    )


def weights_for(patch: core.Patch, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {name: (V, K) if change.layout == "linear" else (K, V) for name, change in patch.modules.items()}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def test_patch_round_trip(tmp_path):
    patch = example_patch()
    core.save_patch(tmp_path / "p", patch)
    for read in (core.load_patch(tmp_path / "p"), core.parse_patch((tmp_path / "p").read_bytes())):
        for field in ("id", "created", "base_model", "base_digest", "config", "requests"):
            assert getattr(read, field) == getattr(patch, field)
        assert read.modules.keys() == patch.modules.keys()
        for name, change in patch.modules.items():
            other = read.modules[name]
            assert (other.layout, other.is_low_rank) == (change.layout, change.is_low_rank)
            assert same(other.dense(), change.dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_patch_adds_its_matrices(dtype):
    patch = example_patch()
    weights = weights_for(patch, dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    patch.add_to(weights)
    for name, change in patch.modules.items():
        delta = change.dense() if change.layout == "linear" else change.dense().T
        compute = torch.promote_types(dtype, torch.float32)
        expected = before[name].to(compute) + delta.to(compute)
        tolerance = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(weights[name].to(compute), expected, rtol=tolerance, atol=tolerance)
    patch.subtract_from(weights)
    for name in weights:
        torch.testing.assert_close(weights[name], before[name], rtol=0.02, atol=0.02)


def test_a_patch_that_does_not_fit_changes_nothing():
    patch = example_patch()
    weights = weights_for(patch)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(ValueError, match=r"changes module 'layers.3', which is not among"):
        patch.add_to({name: weight for name, weight in weights.items() if name != "layers.3"})
    with pytest.raises(ValueError, match=r"module 'layers.3': weight must have shape \[7, 5\]"):
        patch.add_to(weights | {"layers.3": torch.ones(V, K)})
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_patch_files_are_checked(tmp_path):
    path = tmp_path / "p"
    core.save_patch(path, example_patch())
    tensors, metadata = core.load_safetensors(path)
    for changed, fields, message in (
        ({"layers.0/left": torch.ones(V, 3)}, {}, r"left \[v, r\] and right \[r, k\]"),
        ({"layers.0/left": torch.ones(V, 2, dtype=torch.int64)}, {}, "must be a float32, float64"),
        ({"layers.0/left": torch.ones(V, 2).to(torch.float8_e5m2)}, {}, "must be a float32, float64"),
        ({"layers.2/delta": torch.full((V, K), float("inf"))}, {}, "NaN or infinite"),
        ({"layers.2/delta": torch.ones(V)}, {}, "must be a float32, float64"),
        ({"layers.2/left": torch.ones(V, 2)}, {}, "or 'delta' alone"),
        ({}, {"layers.0/layout": "diagonal"}, "layout 'linear' or 'conv1d' in the metadata, not 'diagonal'"),
        ({}, {"version": "7"}, "version 7"),
    ):
        core.save_safetensors(path, tensors | changed, metadata | fields)
        with pytest.raises(ValueError, match=message) as error:
            core.load_patch(path)
        assert str(error.value).startswith(str(path))


def test_python_reads_a_patch(tmp_path):
    patch = example_patch()
    core.save_patch(tmp_path / "p", patch)
    tensors = safetensors.torch.load_file(tmp_path / "p")
    torch.testing.assert_close(tensors["layers.0/left"] @ tensors["layers.0/right"], patch.modules["layers.0"].dense())
    assert torch.equal(tensors["layers.2/delta"], patch.modules["layers.2"].dense())
