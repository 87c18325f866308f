"""Hidden states of unrelated prompts: each alone, CKA and MMD against their definitions, and the maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stableedit_cpp.sideeffects.hidden_states import hidden_states, read_prompts
from stableedit_cpp.sideeffects.maps import embed
from stableedit_cpp.sideeffects.similarity import linear_cka, mmd, relative_shift
from support.tiny import ARCHITECTURES, tiny_model

pytest.importorskip("sklearn", reason="side effects need the extra 'sideeffects'")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_of_each_prompt_alone(architecture, tokenizer):
    model = tiny_model(architecture, torch.float64)
    prompts = ["one", "a longer prompt", "x", "The capital of Peru is"]
    found = hidden_states(model, tokenizer, prompts, [0, 2, -1], max_tokens=40)
    assert list(found) == [0, 2, 3]
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            expected = model(ids, output_hidden_states=True).hidden_states
        for layer, states in found.items():
            np.testing.assert_allclose(states[index], expected[layer][0, -1].numpy(), rtol=1e-5, atol=1e-6)


def test_unknown_layers_and_prompts_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="layers has 7; this model has the layers 0 to 3"):
        hidden_states(tiny_model("llama"), tokenizer, ["a", "b"], [7])
    with pytest.raises(ValueError, match="has 80 tokens; expected 1 to 64"):
        hidden_states(tiny_model("llama"), tokenizer, ["a", "b" * 80])
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
    assert read_prompts(tmp_path / "p.txt", 2) == ["one", "two"]
    (tmp_path / "p.json").write_text('[{"prompt": "one"}]')
    with pytest.raises(ValueError, match="has 1 prompts; hidden states are compared over at least 2"):
        read_prompts(tmp_path / "p.json")


def samples(seed: int, n: int = 40, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def test_cka_properties():
    x, y = samples(0), samples(1)
    rotation, _ = np.linalg.qr(samples(2, 6))
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y @ rotation, x))
    assert 0 < linear_cka(x, y) < 0.5
    assert linear_cka(x, x * np.arange(1, 7)) < 0.99  # not invariant to all linear maps
    # Against the definition through the features (Kornblith et al. 2019, section 3).
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert linear_cka(x, y) == pytest.approx(expected)


def test_mmd_equals_its_definition():
    x, y = samples(0, 12), samples(1, 9) + 1
    found = mmd(x, y, paired=False, permutations=50)
    both = np.concatenate([x, y])
    distances = [math.dist(a, b) for i, a in enumerate(both) for b in both[:i]]
    assert found.bandwidth == pytest.approx(np.median(distances))

    def k(a, b):
        return math.exp(-(math.dist(a, b) ** 2) / (2 * found.bandwidth**2))

    def mean(u, v, same):
        return np.mean([k(a, b) for i, a in enumerate(u) for j, b in enumerate(v) if not (same and i == j)])

    assert found.squared == pytest.approx(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False), abs=1e-9)
    assert found.p_value == pytest.approx(1 / 51)


@pytest.mark.parametrize("paired", [False, True])
def test_mmd_p_values_are_uniform_without_a_difference(paired):
    from scipy.stats import kstest

    p_values = []
    for seed in range(150):
        common = samples(1000 + seed, 20, 3) if paired else 0
        x, y = (common + samples(2 * seed + side, 20, 3) for side in (0, 1))
        p_values.append(mmd(x, y, paired=paired, permutations=199, seed=seed).p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_mmd_sees_a_shift_of_the_same_prompts_only_in_pairs():
    x = samples(0, 60)
    y = x + 0.05
    assert mmd(x, y, paired=True, permutations=500).p_value < 0.01
    assert mmd(x, y, paired=False, permutations=500).p_value > 0.5
    assert mmd(x, x, paired=True, permutations=50).p_value == 1
    assert relative_shift(x, x) == 0


# numba compiles UMAP for a minute, anew in every clone: its cache goes by where the package lies.
@pytest.mark.parametrize("method", ["pca", pytest.param("umap", marks=pytest.mark.slow)])
def test_maps_show_two_clouds_as_two(method):
    if method == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed (extra 'sideeffects')")
    x, y = samples(0, 30), samples(1, 30) + 20
    before, after = embed(x, y, method, seed=3)
    assert before.shape == after.shape == (30, 2)
    spread = max(before.std(0).max(), after.std(0).max())
    assert np.linalg.norm(before.mean(0) - after.mean(0)) > 3 * spread
    again = embed(x, y, method, seed=3)
    np.testing.assert_array_equal(again[0], before)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_maps_leave_torch_its_threads(threads):
    pytest.importorskip("umap", reason="umap-learn is not installed (extra 'sideeffects')")
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        embed(samples(0, 30), samples(1, 30), "umap")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(own)
