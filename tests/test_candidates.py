"""Which sets of modules are tried, and how a trial is scored."""

from __future__ import annotations

import dataclasses
from statistics import fmean, harmonic_mean

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp.editors.candidates import RULE, candidate_modules
from stableedit_cpp.editors.trial_scores import Shares, Trial
from support.layered import llama, mixture


class TestCandidates:
    def test_the_rule_is_first_and_none_comes_twice(self):
        found = candidate_modules(llama(30))
        layers = {name: [int(module.split(".")[2]) for module in modules] for name, modules in found.items()}
        assert layers == {
            RULE: list(range(20, 29)),
            "MLP, last third": list(range(20, 29)),
            "MLP, four of the last third": [22, 24, 26, 28],
            "MLP, every second of the upper half": list(range(15, 29, 2)),
            "MLP, middle third": list(range(10, 20)),
        }
        assert found[RULE] == se.default_edit_modules(llama(30), automatic=True)
        small = candidate_modules(llama(3))
        assert len({tuple(modules) for modules in small.values()}) == len(small) > 1

    @pytest.mark.parametrize("dense", [[], [0], [0, 1]])
    def test_of_a_mixture_of_experts_nothing_dense_and_early(self, dense):
        found = candidate_modules(mixture(dense))
        assert found[RULE] == ["model.layers.4.self_attn.o_proj"]
        of_mlps = [name for modules in found.values() for name in modules if "mlp" in name]
        assert of_mlps and all(".experts." in name and int(name.split(".")[2]) >= 4 for name in of_mlps)

    def test_what_cannot_be_edited_is_left_out(self):
        model = llama()
        for layer in model.model.layers:
            layer.self_attn.o_proj.to(torch.float8_e4m3fn)
        assert not [name for name in candidate_modules(model) if "attention" in name]

    def test_a_model_without_any(self):
        config = transformers.JetMoeConfig(hidden_size=16, num_hidden_layers=2, num_local_experts=2, vocab_size=30)
        model = transformers.JetMoeForCausalLM(config)
        with pytest.raises(ValueError, match="no modules to choose from are known for JetMoeForCausalLM"):
            candidate_modules(model)


class TestScore:
    @staticmethod
    def shares(taken, paraphrases, kept) -> Shares:
        return Shares(*(torch.tensor(part, dtype=torch.float64) for part in (taken, paraphrases, kept)))

    def test_harmonic_mean(self):
        nan = torch.nan
        shares = self.shares([1, 1, 0, 1], [1, nan, 0, 0], [0.5, 0.9])
        assert shares.score == pytest.approx(harmonic_mean([3 / 4, 1 / 3, 0.7]))
        assert self.shares([1, 0], [nan, nan], [0.8]).score == pytest.approx(harmonic_mean([0.5, 0.8]))
        assert self.shares([0, 0], [nan, nan], [1.0]).score == 0.0

    def test_noise_is_that_of_paired_differences(self):
        """Against a loop; two trials that fail at the same requests differ by nothing."""
        torch.manual_seed(1)
        nan = torch.full((40,), torch.nan, dtype=torch.float64)
        first = Shares(torch.bernoulli(torch.full((40,), 0.7)).double(), nan, torch.rand(24).double())
        second = Shares(torch.bernoulli(torch.full((40,), 0.6)).double(), nan, torch.rand(24).double())
        assert first.noise(first) == 0.0
        differences = []
        for _ in range(2000):
            rows, columns = torch.randint(40, (40,)), torch.randint(24, (24,))
            scores = [
                harmonic_mean([fmean(one.taken[rows].tolist()), fmean(one.kept[columns].tolist())])
                for one in (first, second)
            ]
            differences.append(scores[0] - scores[1])
        assert first.noise(second) == pytest.approx(float(torch.tensor(differences).std()), rel=0.1)

    def test_in_the_running(self):
        trial = Trial("a", ["b"], 8, score=0.5)
        assert not trial.in_the_running
        assert dataclasses.replace(trial, behind=0.1, noise=0.06).in_the_running
        assert not dataclasses.replace(trial, behind=0.1, noise=0.04).in_the_running
