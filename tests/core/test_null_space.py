"""The null space of a second moment, and a seed of the past keys, against dense float64 formulas."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.core import NullSpace, PastKeys, load_state, ridge_update, save_state
from support.core import rows

K, V, THRESHOLD = 32, 5, 1e-3


def moment() -> torch.Tensor:
    """A second moment with eigenvalues from 1 down to 1e-8, [k, k] float64."""
    rotation = torch.linalg.qr(rows(K, K, 1))[0]
    return rotation @ torch.diag(torch.logspace(0, -8, K, dtype=torch.float64)) @ rotation.T


def projector(moment: torch.Tensor, threshold: float) -> torch.Tensor:
    """P by the released AlphaEdit code: the columns of the singular vectors below the threshold."""
    vectors, values, _ = torch.linalg.svd(moment)
    kept = vectors[:, values < threshold]
    return kept @ kept.T


@pytest.mark.parametrize("threshold", [1e-7, 1e-3, 0.5, 2.0])
def test_projects_as_the_released_formula(threshold):
    space, keys = NullSpace(moment(), threshold), rows(6, K, 2)
    expected = projector(moment(), threshold)
    torch.testing.assert_close(space.project(keys), keys @ expected)
    assert space.rank == round(float(expected.trace()))
    assert space.basis.shape == (K, min(space.rank, K - space.rank))
    narrow = space.to(torch.float32)
    assert narrow.basis.dtype == torch.float32
    torch.testing.assert_close(narrow.project(keys.float()).double(), keys @ expected, rtol=0, atol=1e-5)


def test_alphaedit_turns_equal_the_released_code_and_each_other():
    """Three turns, then all of it at once: with targets that stay, past keys make them one least-squares problem."""
    p, space = projector(moment(), THRESHOLD), NullSpace(moment(), THRESHOLD)
    past, cache, total = PastKeys(K), torch.zeros(K, K, dtype=torch.float64), torch.zeros(V, K, dtype=torch.float64)
    keys, targets = rows(12, K, 3), rows(12, V, 4)
    for some in (slice(0, 5), slice(5, 7), slice(7, 12)):
        h, residual = keys[some], targets[some] - keys[some] @ total.T
        released = torch.linalg.solve(p @ (h.T @ h + cache) + 10.0 * torch.eye(K), p @ h.T @ residual).T
        projected = space.project(h)
        update = ridge_update(projected, residual, 10.0, past_keys=past, past_key_weight=1.0).dense()
        torch.testing.assert_close(update, released)
        past.update(projected)
        cache += h.T @ h
        total += update
    at_once = ridge_update(space.project(keys), targets, 10.0).dense()
    torch.testing.assert_close(total, at_once)
    text = torch.linalg.eigh(moment())[1][:, -space.basis.shape[1] :]  # directions that text uses
    assert (total @ text).norm() < 1e-10 * total.norm()
    assert torch.trace(total @ moment() @ total.T) <= THRESHOLD * total.square().sum()


@pytest.mark.parametrize(
    ("dtype", "relative_ridge", "tolerance"), [(torch.float32, 1e-3, 1e-4), (torch.float64, 1e-6, 1e-9)]
)
def test_memit_is_a_seed_of_the_past_keys(dtype, relative_ridge, tolerance):
    weight, past = 15000.0, PastKeys.seeded(moment().to(dtype), 15000.0, count=7)
    assert past.count == 7 and past.rank is None
    ridge = relative_ridge * weight * float(moment().diagonal().mean())
    for seed in range(3):
        keys, targets = rows(4, K, seed), rows(4, V, 10 + seed)
        system = weight * moment() + keys.T @ keys + ridge * torch.eye(K, dtype=torch.float64)
        expected = torch.linalg.solve(system, keys.T @ targets).T
        update = ridge_update(keys.to(dtype), targets.to(dtype), ridge, past_keys=past, past_key_weight=1.0)
        assert (update.dense().double() - expected).norm() < tolerance * expected.norm()
    assert past.factorisations == 1


def test_a_seed_survives_its_factor():
    """Which is kept in the same matrix: as moment, in a state, for other weights and under further keys."""
    keys, past, fresh = rows(3, K, 6), PastKeys.seeded(moment(), 3.0), PastKeys.seeded(moment(), 3.0)
    for turn in range(12):  # folded every third turn
        past.solve(keys, weight=1.0, ridge=0.1 + turn % 2)
        assert torch.equal(past.second_moment, fresh.second_moment)
        ours, theirs = past.state_dict(), fresh.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        again = PastKeys.from_state_dict(ours)
        for one in (past, fresh, again):
            one.update(rows(3, K, 20 + turn))
        solved = [one.solve(keys, weight=0.5, ridge=0.2) for one in (past, again)]
        assert torch.equal(*solved)
        expected = torch.linalg.solve(0.5 * past.second_moment + 0.2 * torch.eye(K, dtype=torch.float64), keys.T).T
        torch.testing.assert_close(solved[0], expected)
    total = 3.0 * moment() + sum(r.T @ r for r in (rows(3, K, 20 + turn) for turn in range(12)))
    torch.testing.assert_close(past.second_moment, total)


def test_both_survive_a_state_file(tmp_path):
    space, past = NullSpace(moment(), 0.1, relative=True).to(torch.float32), PastKeys.seeded(moment(), 3.0)
    past.update(rows(2, K, 5))
    save_state(tmp_path / "state.safetensors", {"null_space/m": space.state_dict(), "past_keys/m": past.state_dict()})
    components, _ = load_state(tmp_path / "state.safetensors")
    keys = rows(3, K, 6)
    again = NullSpace.from_state_dict(components["null_space/m"])
    assert torch.equal(again.project(keys), space.project(keys))
    assert (again.rank, again.threshold, again.complement) == (space.rank, space.threshold, space.complement)
    loaded = PastKeys.from_state_dict(components["past_keys/m"])
    assert torch.equal(loaded.solve(keys, weight=1.0, ridge=0.1), past.solve(keys, weight=1.0, ridge=0.1))


def test_bad_input_is_a_sentence():
    with pytest.raises(ValueError, match=r"threshold of 1e-09 leaves no null space: the least eigenvalue .* larger"):
        NullSpace(moment(), 1e-9)
    with pytest.raises(ValueError, match=r"moment must be square \[k, k\], but its shape is \[2, 32\]"):
        NullSpace(moment()[:2], 1.0)
    with pytest.raises(ValueError, match="threshold must be finite and positive, but it is -1"):
        NullSpace(moment(), -1.0)
    with pytest.raises(ValueError, match=r"keys must have shape \[n, 32\]"):
        NullSpace(moment(), 1.0).project(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        NullSpace(moment(), 1.0).to(torch.float16)
    with pytest.raises(ValueError, match="weight must be finite and positive, but it is 0"):
        PastKeys.seeded(moment(), 0.0)
    with pytest.raises(ValueError, match="lacks 'complement'"):
        NullSpace.from_state_dict({"basis": torch.eye(3)[:, :1], "threshold": torch.tensor(1.0).double()})
