"""Update geometry, drift and rates against dense arithmetic and synthetic data."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.experiments import find_source
from stableedit_cpp.experiments.convergence import fit_rate
from stableedit_cpp.experiments.geometry import Geometry
from support.streams import MODULES, OPTIONS, load, write_data


@pytest.fixture
def stream(tmp_path):
    return find_source("zsre", data=write_data(tmp_path))


def weights(model) -> torch.Tensor:
    return torch.cat([model.get_submodule(name).weight.detach().double().flatten() for name in MODULES])


@pytest.mark.parametrize("passes", [1, 3])
def test_geometry_is_that_of_the_weight_changes(stream, passes):
    model, tokenizer = load("tiny")
    model.double()
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(**OPTIONS, max_passes=passes))
    geometry = Geometry(editor, earlier=100, seed=0)
    start, updates, statistics = weights(model), [], []
    for number in range(5):
        before = weights(model)
        editor.edit(stream.requests(10 * number, 10 * number + 10), progress=False)
        updates.append(weights(model) - before)
        moments = next(iter(editor.normalizers.values())).value_moments
        tracker = next(iter(editor.normalizers.values())).value_tracker
        statistics.append((moments.mean(), tracker.covariance() if tracker.has_covariance() else None))
        found, update = geometry.latest, updates[-1]
        assert found["norm"] == pytest.approx(float(update.norm()), rel=1e-6)
        assert found["cumulative_norm"] == pytest.approx(float((weights(model) - start).norm()), rel=1e-6)
        cosines = [float(torch.cosine_similarity(update, other, 0)) for other in updates[:-1]]
        assert found["earlier"] == list(range(1, number))
        assert found["cosine_earlier"] == pytest.approx(cosines[:-1], abs=1e-6)
        assert found["cosine_last"] == (pytest.approx(cosines[-1], abs=1e-6) if number else None)
        assert set(found["modules"]) == set(MODULES)
        (drift,) = found["statistics"].values()
        if number > 1 and statistics[-2][1] is not None:
            (old_mean, old), (mean, new) = statistics[-2:]
            assert drift["mean_drift"] == pytest.approx(float((mean - old_mean).norm() / new.trace().sqrt()))
            assert drift["covariance_drift"] == pytest.approx(float((new - old).norm() / new.norm()))
    assert drift["covariance_drift"] is not None


def test_earlier_updates_are_drawn_evenly(stream):
    """Reservoir sampling over 200 turns: each is kept with the same probability, whatever its age."""
    model, tokenizer = load("tiny")
    counts = torch.zeros(201)
    for seed in range(300):
        geometry = Geometry(se.UltraEdit(model, tokenizer, se.UltraEditConfig(edit_modules=MODULES)), 10, seed)
        for turn in range(1, 201):
            geometry._turns = turn
            geometry._keep({})
        assert len(geometry._kept) == 10
        counts[list(geometry._kept)] += 1
    thirds = counts[1:].view(4, 50).sum(1)  # 3,000 draws, 750 expected in each quarter, standard deviation 24
    assert (thirds - 750).abs().max() < 100


def test_diagonal_editors_have_no_covariance_to_drift(stream):
    model, tokenizer = load("tiny")
    editor = se.UltraEdit(model, tokenizer, se.UltraEditConfig(**OPTIONS))
    geometry = Geometry(editor, 2, 0)
    editor.edit(stream.requests(0, 30), progress=False)
    (drift,) = geometry.latest["statistics"].values()
    assert drift["covariance_drift"] is None and drift["mean_drift"] > 0


def test_the_rate_of_independent_samples_is_one_half():
    torch.manual_seed(0)
    rows = torch.randn(20_000, 30, dtype=torch.float64) * torch.linspace(0.1, 2, 30)
    sizes = [int(100 * 1.3**k) for k in range(19)]
    whole = rows.T.cov()
    points = [
        {"edits": n, "samples": n, "distance": float((rows[:n].T.cov() - whole).norm() / whole.norm())} for n in sizes
    ]
    fit = fit_rate(points, len(rows))
    assert abs(fit["rate"] - 0.5) < 0.1
    assert 0 < fit["rate_standard_error"] < 0.1
    assert fit_rate(points[:2], len(rows)) == {"rate": None, "rate_standard_error": None}


def test_frozen_statistics_are_those_of_the_warm_up(stream):
    model, tokenizer = load("tiny")
    config = se.StableEditConfig.one_pass(**OPTIONS, frozen_statistics=True)
    editor = se.StableEdit(model, tokenizer, config)
    editor.warm_up(stream.warm_up_requests(), progress=False)
    (normalizer,) = editor.normalizers.values()
    count, mean = normalizer.count, normalizer.value_moments.mean()
    editor.edit(stream.requests(0, 20), progress=False)
    assert normalizer.count == count > 0
    assert torch.equal(normalizer.value_moments.mean(), mean)

    model, tokenizer = load("tiny")
    editor = se.StableEdit(model, tokenizer, config)  # without a warm-up: those of the first turn
    editor.edit(stream.requests(0, 10), progress=False)
    (normalizer,) = editor.normalizers.values()
    count = normalizer.count
    editor.edit(stream.requests(10, 20), progress=False)
    assert normalizer.count == count > 0
    with pytest.raises(ValueError, match="frozen_statistics must be true or false"):
        se.StableEditConfig.one_pass(frozen_statistics=1)
