"""Every noun of the core on every device, against formulas written out in float64 on the CPU."""

from __future__ import annotations

import threading

import pytest
import torch

from stableedit_cpp import core
from support.core import DTYPES, LAYOUTS, close, inverse_root, rows
from support.devices import of_its_own, on_devices, settled

K, V, N, RIDGE, WEIGHT = 12, 5, 9, 0.7, 0.3
pytestmark = on_devices


def at(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def agrees(found: torch.Tensor, expected: torch.Tensor, device: str, dtype: torch.dtype = torch.float64) -> None:
    """It is on the device, and what the oracle says."""
    assert found.device.type == device
    close(found.cpu(), expected, dtype)


def dual_free(keys: torch.Tensor, targets: torch.Tensor, past: torch.Tensor | None = None) -> torch.Tensor:
    """D of the k x k system, [k, v]."""
    system = keys.T @ keys + RIDGE * torch.eye(K, dtype=torch.float64)
    if past is not None:
        system = system + WEIGHT * past.T @ past
    return torch.linalg.solve(system, keys.T @ targets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_moments(device, dtype):
    first, second = rows(N, K, 1, dtype), rows(3, K, 2, dtype)
    moments, other = core.RunningMoments(K), core.RunningMoments(K)
    moments.update(first.to(device))
    other.update(second.to(device))
    moments.merge(other)
    x = torch.cat([first, second]).double()
    agrees(moments.mean(), x.mean(0), device)
    agrees(moments.variance(), x.var(0), device)
    agrees(moments.m2(), x.var(0, correction=0) * len(x), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_inverse_wishart(device, dtype):
    tracker, batches = core.NormalInverseWishart(V), [rows(n, V, n, dtype) for n in (6, 4, 7)]
    for batch in batches:
        tracker.update(batch.to(device))
    x = torch.cat(batches).double()
    deviation = x - x.mean(0)
    accuracy = torch.float64 if dtype == torch.float64 else torch.float32
    agrees(tracker.mean(), x.mean(0), device, accuracy)
    agrees(tracker.psi(), deviation.T @ deviation, device, accuracy)
    agrees(tracker.covariance(), deviation.T @ deviation / (len(x) - V - 1), device, accuracy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitener(device, dtype):
    factor, x = rows(V - 2, V, 1), rows(N, V, 2, dtype)
    sigma = factor.T @ factor
    for floor, mode in ((0.1, "relative"), (0.5, "absolute")):
        whitener = core.Whitener.full(sigma.to(device), floor=floor, floor_mode=mode)
        agrees(whitener.transform(x.to(device)), x.double() @ inverse_root(sigma, floor, mode), device, dtype)
    spread = 0.5 + torch.rand(V, dtype=torch.float64)
    diagonal = core.Whitener.diagonal(spread.to(device)).transform(x.to(device))
    agrees(diagonal, x.double() / (spread + torch.finfo(dtype).eps), device, dtype)


@pytest.mark.parametrize("form", ["auto", "primal", "dual"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge(device, dtype, form):
    keys, targets = rows(N, K, 1, dtype), rows(N, V, 2, dtype)
    expected = dual_free(keys.double(), targets.double())
    agrees(core.solve_ridge(*at(device, keys, targets), RIDGE, form), expected, device, dtype)
    agrees(core.ridge_update(*at(device, keys, targets), RIDGE).dense(), expected.T, device, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_update(device, dtype, layout):
    left, right = rows(V, N, 1, dtype), rows(N, K, 2, dtype)
    dense = left.double() @ right.double()
    update = core.LowRankUpdate(*at(device, left, right))
    agrees(update.dense(), dense, device, dtype)
    assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-5)
    assert update.inner(update.scaled(2.0)) == pytest.approx(2 * float(dense.square().sum()), rel=1e-5)
    few = torch.tensor([0, 4])
    agrees(update.select(few.to(device)).dense(), left[:, few].double() @ right[few].double(), device, dtype)
    shape = (V, K) if layout == "linear" else (K, V)
    weight = rows(*shape, 3, dtype).to(device)
    before = weight.cpu().double().clone()
    update.add_to(weight, layout)
    agrees(weight, before + (dense if layout == "linear" else dense.T), device, dtype)
    update.subtract_from(weight, layout)
    agrees(weight, before, device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["none", "diagonal", "full"])
def test_module_editor_and_normalizer(device, dtype, mode):
    """Of the method, section 3."""
    options = core.WhiteningOptions(mode=mode, floor=0.1)
    editor = core.ModuleEditor(core.LifelongNormalizer(K, V, whitening=options), step_size=0.01, ridge=RIDGE)
    seen_h, seen_g = rows(20, K, 1, dtype), rows(20, V, 2, dtype)
    for part in (slice(0, 11), slice(11, 20)):
        h, g = seen_h[part], seen_g[part]
        update = editor.edit(*at(device, h, g))
    h, g, all_h, all_g = (tensor.double() for tensor in (h, g, seen_h, seen_g))
    eps, h_hat, g_hat = torch.finfo(dtype).eps, h, g
    if mode != "none":
        h_hat = (h - all_h.mean(0)) / (all_h.std(0) + eps)
        g_hat = (g - all_g.mean(0)) / (all_g.std(0) + eps)
    if mode == "full":
        deviation = all_g - all_g.mean(0)
        sigma = deviation.T @ deviation / (len(all_g) - V - 1)
        g_hat = (g - all_g.mean(0)) @ inverse_root(sigma, 0.1, "relative")
    targets = -0.01 * h_hat.square().sum(1, keepdim=True) * g_hat
    agrees(editor.targets(*at(device, h.to(dtype), g.to(dtype))), targets, device, dtype)
    agrees(update.dense(), dual_free(h, targets).T, device, torch.float32)
    decrease = core.first_order_decrease(update, *at(device, h.to(dtype), g.to(dtype)))
    assert decrease == pytest.approx(-float((g * (h @ update.dense().cpu().double().T)).sum()), rel=1e-4)


def test_what_a_normalizer_keeps(device):
    """A copy, a way back, a merger and a state, on the device."""
    normalizer, keys, gradients = core.LifelongNormalizer(K, V), rows(N, K, 1), rows(N, V, 2)
    normalizer.observe(*at(device, keys, gradients))
    before, white = normalizer.copy(), normalizer.normalize_value_gradients(gradients.to(device))
    normalizer.observe(*at(device, 3 * keys, 3 * gradients))
    normalizer.restore(before)
    again = core.LifelongNormalizer.from_state_dict(normalizer.state_dict())
    for one in (normalizer, before, again):
        assert torch.equal(one.normalize_value_gradients(gradients.to(device)), white)
    normalizer.merge(before)
    assert normalizer.count == 2 * N


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_master_weight(device, dtype, layout):
    shape = (V, K) if layout == "linear" else (K, V)
    live = rows(*shape, 1, dtype).to(device)
    before, computed = live.cpu().clone(), torch.float64 if dtype == torch.float64 else torch.float32
    factors = 1e-3 * rows(V, N, 2, computed), rows(N, K, 3, computed)
    dense = factors[0].double() @ factors[1].double()
    weight, update = core.MasterWeight(live, layout), core.LowRankUpdate(*at(device, *factors))
    weight.check(update)
    weight.apply(update)
    agrees(weight.master, before.double() + (dense if layout == "linear" else dense.T), device, dtype)
    assert torch.equal(live, weight.master.to(dtype))  # rounded once
    weight.revert(update)
    assert torch.equal(live.cpu(), before)


@pytest.mark.parametrize("rank", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_past_keys(device, dtype, rank):
    past, seen = core.PastKeys(K, rank), []
    keys, targets = rows(N, K, 7, dtype), rows(N, V, 8, dtype)
    for size in (3, 4, 20):
        seen.append(rows(size, K, size, dtype))
        past.update(seen[-1].to(device))
        update = core.ridge_update(*at(device, keys, targets), RIDGE, past_keys=past, past_key_weight=WEIGHT)
        expected = dual_free(keys.double(), targets.double(), torch.cat(seen).double())
        agrees(update.dense(), expected.T, device, torch.float32 if dtype == torch.float32 else dtype)
    moment = torch.cat(seen).double()
    agrees(past.second_moment, moment.T @ moment, device, dtype)


def test_seeded_past_keys_and_null_space(device):
    rotation = torch.linalg.qr(rows(K, K, 1))[0]
    values = torch.logspace(0, -8, K, dtype=torch.float64)
    moment, keys = rotation @ torch.diag(values) @ rotation.T, rows(N, K, 2)
    space = core.NullSpace(moment.to(device), 1e-3)
    free = rotation[:, values < 1e-3]
    agrees(space.project(keys.to(device)), keys @ free @ free.T, device)
    past = core.PastKeys.seeded(moment.to(device), 3.0)
    system = WEIGHT * 3.0 * moment + RIDGE * torch.eye(K, dtype=torch.float64)
    solved = past.solve(keys.to(device), weight=WEIGHT, ridge=RIDGE)
    agrees(solved, torch.linalg.solve(system, keys.T).T, device)


@pytest.mark.parametrize("with_past", [False, True])
def test_contribution(device, with_past):
    keys, targets, past = rows(N, K, 1), rows(N, V, 2), rows(20, K, 3)
    past_keys = core.PastKeys(K)
    if with_past:
        past_keys.update(past.to(device))
    how = {"past_keys": past_keys, "past_key_weight": WEIGHT}
    update = core.ridge_update(*at(device, keys, targets), RIDGE, **how)
    owned = torch.zeros(N, dtype=torch.bool)
    owned[[0, 3, 4]] = True
    what = {"keys": keys.to(device)} if with_past else {"ridge": RIDGE}
    share = core.contribution(update, owned.to(device), **what)
    rest = dual_free(keys[~owned], targets[~owned], past if with_past else None)
    agrees(update.dense() - share.dense(), rest.T, device)


def test_patches_and_states_go_through_files(device, tmp_path):
    """Which hold tensors of the host, whatever they were made of."""
    left, right, dense = rows(V, 2, 1, torch.float32), rows(2, K, 2, torch.float32), rows(V, K, 3, torch.float32)
    changes = {
        "a": core.WeightChange(core.LowRankUpdate(*at(device, left, right))),
        "b": core.WeightChange(dense.to(device), "conv1d"),
    }
    core.save_patch(tmp_path / "patch.safetensors", core.Patch(changes))
    patch = core.load_patch(tmp_path / "patch.safetensors")
    weights = {"a": torch.zeros(V, K, device=device), "b": torch.zeros(K, V, device=device)}
    for name, change in patch.modules.items():
        change.to(torch.device(device)).add_to(weights[name])
    agrees(weights["a"], left.double() @ right.double(), device, torch.float32)
    agrees(weights["b"], dense.double().T, device, torch.float32)
    moments = core.RunningMoments(K)
    moments.update(rows(N, K).to(device))
    core.save_state(tmp_path / "state.safetensors", {"moments": moments.state_dict()})
    components, _ = core.load_state(tmp_path / "state.safetensors")
    assert torch.equal(core.RunningMoments.from_state_dict(components["moments"]).mean(), moments.mean().cpu())


def turn(device: str) -> torch.Tensor:
    """The weight after a turn of the mathematics."""
    keys, gradients = at(device, rows(N, K, 1, torch.float32), rows(N, V, 2, torch.float32))
    editor = core.ModuleEditor(core.LifelongNormalizer(K, V), step_size=0.01, ridge=RIDGE)
    live = rows(V, K, 3, torch.bfloat16).to(device)
    core.MasterWeight(live).apply(editor.edit(keys, gradients))
    return live


def test_two_streams_at_once(device):
    """Each thread in a stream of its own: the mathematics stays in the stream that it is called in."""
    expected, found = turn(device).cpu(), {}

    def work(number: int) -> None:
        with of_its_own(device):
            for _ in range(20):
                found[number] = turn(device).cpu()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settled(device)
    assert all(torch.equal(found[number], expected) for number in range(2))
