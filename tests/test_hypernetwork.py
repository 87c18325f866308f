"""The hypernetwork editors against the rule written out: dense solutions and autograd in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.func import functional_call

import stableedit_cpp as se
from stableedit_cpp.core import ridge_update
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.editors.hypernetwork.implicit import PassedThrough
from stableedit_cpp.editors.hypernetwork.network import HyperNetwork
from stableedit_cpp.editors.hypernetwork.training import Training
from stableedit_cpp.editors.hypernetwork.training_data import loss_prompts, training_turns
from stableedit_cpp.model.tokens import tokenize
from support.captures import MICRO_BATCH, plain_reference, sequences_of
from support.editors import assert_same_bits, state_of
from support.hypernetworks import STEP, TRAINING, PlainMoments, fields_of, make_hyper, plain_update, stir
from support.tiny import FACTS, tiny_model

# Of a model without float32 in the middle, as the norms of Llama have it.
MODULES = [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in range(3)]
EDITORS = {
    "rledit": {},
    "malmen": {"editor": se.MALMEN, "config": se.MALMENConfig},
}


def exact_model() -> torch.nn.Module:
    return tiny_model("gpt_neox", torch.float64)


def rows(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pooled(modules, keys, gradients, sizes, moments):
    """Fold one turn into (moments of keys, moments of gradients), a micro-batch of a module at a time."""
    for name in modules:
        for batch in keys[name].split(sizes):
            key = moments[0].add(batch)
        for batch in gradients[name].split(sizes):
            gradient = moments[1].add(batch)
    return key, gradient


def sizes_of(sequences) -> list[int]:
    """Answer tokens of each micro-batch."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    cuts = range(0, len(order), MICRO_BATCH)
    return [sum(len(sequences[index].answer) for index in order[begin : begin + MICRO_BATCH]) for begin in cuts]


class TestTheRule:
    @pytest.mark.parametrize("kind", EDITORS)
    @pytest.mark.parametrize("published", [False, True], ids=["exact", "unbiased"])
    def test_untrained_it_is_the_dense_rule(self, kind, published, tokenizer):
        """V = -step <h, h_hat> g_hat over three turns, in which the weights and the statistics go on."""
        editor = make_hyper(tokenizer, exact_model(), edit_modules=MODULES, unbiased_batches=published, **EDITORS[kind])
        model = exact_model()
        moments = PlainMoments(published), PlainMoments(published)
        for begin in (0, 5, 10):
            facts = FACTS[begin : begin + 5]
            keys, gradients = plain_reference(model, sequences_of(tokenizer, facts), MODULES)
            (mean, std), (g_mean, g_std) = pooled(
                MODULES, keys, gradients, sizes_of(sequences_of(tokenizer, facts)), moments
            )
            for name in MODULES:
                h = keys[name]
                agreement = (h * (h - mean) / std).sum(1, keepdim=True)
                targets = -STEP * agreement * (gradients[name] - g_mean) / g_std
                update = torch.linalg.solve(h.T @ h + torch.eye(h.shape[1], dtype=h.dtype), h.T @ targets)
                with torch.no_grad():
                    model.get_submodule(name).weight += update.T
            editor.edit(facts)
            for name in MODULES:
                found, wanted = (one.get_submodule(name).weight for one in (editor.model, model))
                torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("kind", EDITORS)
    def test_with_a_network_it_is_the_dense_rule(self, kind, tokenizer):
        editor = make_hyper(tokenizer, exact_model(), edit_modules=MODULES, **EDITORS[kind])
        stir(editor)
        model, moments = exact_model(), (PlainMoments(), PlainMoments())
        for begin in (0, 5):
            facts = FACTS[begin : begin + 5]
            sequences = sequences_of(tokenizer, facts)
            keys, gradients = plain_reference(model, sequences, MODULES)
            seen = pooled(MODULES, keys, gradients, sizes_of(sequences), moments)
            for index, name in enumerate(MODULES):
                update = plain_update(fields_of(editor), index, keys[name], gradients[name], seen)
                with torch.no_grad():
                    model.get_submodule(name).weight += update.T
            editor.edit(facts)
        for name in MODULES:
            found, wanted = (one.get_submodule(name).weight for one in (editor.model, model))
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)

    def test_the_network_of_each_shape_is_its_own(self, tokenizer):
        names = ["model.layers.{1,2}.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
        editor = make_hyper(tokenizer, edit_modules=names)
        assert {name: network.fields["step"].shape for name, network in editor.solver.networks.items()} == {
            "24 -> 16": (2,),
            "16 -> 16": (1,),
        }
        editor.edit(FACTS)

    def test_a_network_that_is_none_is_refused(self):
        fields = HyperNetwork.untrained(5, 2, rank=3, blocks=1, step_size=1.0, ridge=1.0).state_dict()
        assert_same_bits(HyperNetwork.from_state_dict(fields).fields, fields)
        for wrong in ({**fields, "up": fields["up"][..., 1:]}, {"down": fields["down"]}, {}):
            with pytest.raises(ValueError, match="not the state of a hypernetwork"):
                HyperNetwork.from_state_dict(wrong)


class TestTheImplicitGradient:
    @pytest.mark.parametrize(("n", "k"), [(7, 20), (20, 7)])
    @pytest.mark.parametrize("penalty", [0.0, 0.3])
    def test_is_that_of_autograd_through_the_dense_solution(self, n, k, penalty):
        v, m = 5, 11
        keys, loss_keys, output_gradients = rows(n, k, 0), rows(m, k, 2), rows(m, v, 3)
        targets, log_ridge = rows(n, v, 1).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        system = keys.T @ keys + log_ridge.exp() * torch.eye(k, dtype=torch.float64)
        update = torch.linalg.solve(system, keys.T @ targets)
        loss = (update * (loss_keys.T @ output_gradients)).sum() + penalty * update.square().sum()
        loss.backward()

        ridge = float(log_ridge.detach().exp())
        through = PassedThrough(keys, ridge_update(keys, targets.detach(), ridge), ridge)
        for part in torch.arange(m).split(4):
            through.add(loss_keys[part], output_gradients[part])
        through.add_penalty(penalty)
        gradient, of_log_ridge = through.gradients()
        torch.testing.assert_close(gradient, targets.grad, rtol=1e-10, atol=1e-12)
        assert of_log_ridge == pytest.approx(float(log_ridge.grad), rel=1e-10)


class PlainTraining:
    """Training as it would be written with all of memory: dense updates, and autograd through everything."""

    def __init__(self, tokenizer, fields, config) -> None:
        self.model = exact_model()
        self.tokenizer, self.config = tokenizer, config
        self.fields = {name: field.requires_grad_() for name, field in fields.items()}
        self.moments = PlainMoments(), PlainMoments()
        self.optimizer = torch.optim.Adam(self.fields.values(), lr=config.learning_rate)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def tokens(self, pairs):
        return tokenize(self.tokenizer, pairs, 64, [""] * len(pairs))

    def loss(self, sequences, weights, other=None):
        """Mean over the answer tokens of each micro-batch, summed; of answers, or from the model with other weights."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
        total = 0.0
        for begin in range(0, len(order), MICRO_BATCH):
            part, tokens = 0.0, 0
            for sequence in (sequences[index] for index in order[begin : begin + MICRO_BATCH]):
                ids, first = torch.tensor([sequence.ids]), sequence.first
                logits = functional_call(self.model, weights, ids).logits[0, first:]
                if other is None:
                    part = part + torch.nn.functional.cross_entropy(
                        logits, torch.tensor(sequence.answer), reduction="sum"
                    )
                else:
                    before = functional_call(self.model, other, ids).logits[0, first:].log_softmax(-1).detach()
                    part = part + (before.exp() * (before - logits.log_softmax(-1))).sum()
                tokens += len(sequence.answer)
            total = total + part / tokens
        return total

    def run(self, requests) -> None:
        config, seen = self.config, []
        for begin in range(0, len(requests), config.turn_size):
            seen.insert(0, requests[begin : begin + config.turn_size])
            edits = self.tokens([(one["prompt"], one["target"]) for one in seen[0]])
            keys, gradients = plain_reference(self.model, edits, MODULES)
            moments = pooled(MODULES, keys, gradients, sizes_of(edits), self.moments)
            before = {f"{name}.weight": self.model.get_submodule(name).weight.detach().clone() for name in MODULES}
            updates = {
                f"{name}.weight": plain_update(self.fields, index, keys[name], gradients[name], moments).T
                for index, name in enumerate(MODULES)
            }
            after = {name: before[name] + update for name, update in updates.items()}
            loss = 0.0
            for age, part in enumerate(seen[: config.horizon]):
                rephrases = self.tokens([(one["rephrase"], one["target"]) for one in part])
                unrelated = self.tokens([(one["locality_prompt"], one["locality_target"]) for one in part])
                here = self.loss(rephrases, after) + config.locality_weight * self.loss(unrelated, after, before)
                loss = loss + config.discount**age * here
            loss = loss + config.update_penalty * sum(update.square().sum() for update in updates.values())
            loss.backward()
            if config.turns_per_step == 1 or begin + config.turn_size >= len(requests):
                torch.nn.utils.clip_grad_norm_(self.fields.values(), config.clip)
                self.gradients.append({name: field.grad.clone() for name, field in self.fields.items()})
                self.optimizer.step()
                self.optimizer.zero_grad()
            if config.keeps_edits:
                with torch.no_grad():
                    for name, value in after.items():
                        self.model.get_parameter(name).copy_(value)


class TestTraining:
    @pytest.mark.parametrize(
        "settings",
        [
            pytest.param({"horizon": 2, "discount": 0.7, "update_penalty": 0.1}, id="rledit"),
            pytest.param({"horizon": 2, "turns_per_step": None, "clip": 100.0}, id="rledit, one step"),
            pytest.param(EDITORS["malmen"], id="malmen"),
        ],
    )
    def test_is_that_of_autograd_through_everything(self, settings, tokenizer, monkeypatch):
        editor = make_hyper(tokenizer, exact_model(), edit_modules=MODULES, turn_size=7, **settings)
        stir(editor)
        plain, found = PlainTraining(tokenizer, fields_of(editor), editor.config), []
        step = Training._step

        def noted(training):
            training._clip()
            (network,) = editor.solver.networks.values()
            found.append({name: field.grad.clone() for name, field in network.fields.items()})
            step(training)

        monkeypatch.setattr(Training, "_step", noted)
        before = state_of(editor)
        report = editor.train(TRAINING, progress=False)
        plain.run(TRAINING)
        assert report.steps == len(found) == len(plain.gradients) > 0 and len(report.losses) == 2
        for one, other in zip(found, plain.gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
            assert all(gradient.any() for gradient in one.values())
        torch.testing.assert_close(
            fields_of(editor), {n: f.detach() for n, f in plain.fields.items()}, rtol=1e-5, atol=1e-7
        )
        after = state_of(editor)
        weights = [name for name in before if name.startswith("model ")]
        assert_same_bits({name: after[name] for name in weights}, {name: before[name] for name in weights})
        assert after["count 24 -> 16"] == len(MODULES) * sum(len(one.answer) for one in sequences_of(tokenizer))
        torch.testing.assert_close(after["key mean 24 -> 16"], plain.moments[0].mean)

    def test_every_part_of_an_untrained_network_learns(self, tokenizer):
        editor = make_hyper(tokenizer, epochs=2)
        editor.checkpoint()
        before = fields_of(editor)
        editor.train(TRAINING, progress=False)
        after = fields_of(editor)
        assert not [name for name in before if torch.equal(before[name], after[name])]

    def test_as_published_every_step_moves_by_the_learning_rate_once(self, tokenizer):
        config = se.RLEditConfig.published
        editor = make_hyper(tokenizer, config=config, step_size=1e-6, learning_rate=1e-5, turn_size=5)
        report = editor.train(TRAINING, progress=False)
        assert report.steps == 1 and len(report.losses) == 3
        (network,) = editor.solver.networks.values()
        moved = (network.fields["step"].double() - 1e-6).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-5), rtol=1e-4, atol=0)
        assert (network.fields["log_ridge"].abs() <= 1.001e-5).all()

    def test_the_penalty_shrinks_the_updates(self, tokenizer):
        norms = []
        for penalty in (0.0, 1e3):
            editor = make_hyper(tokenizer, update_penalty=penalty, epochs=6, step_size=1e-2)
            norms.append(editor.train(TRAINING, progress=False).update_norms[-1])
        assert norms[1] < 0.7 * norms[0]

    def test_training_makes_edits_generalize(self, tokenizer):
        """The loss of the rephrases with their own turn's edits goes down."""
        editor = make_hyper(tokenizer, epochs=8, learning_rate=3e-3, locality_weight=0.0, horizon=1)
        losses = editor.train(TRAINING, progress=False).losses
        assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


class TestPromptsOfTheLoss:
    def turns(self, tokenizer):
        editor = make_hyper(tokenizer, turn_size=5, horizon=3)
        return training_turns(editor, as_requests(TRAINING), True)[::-1], editor.config

    def test_all_of_the_horizon(self, tokenizer):
        past, config = self.turns(tokenizer)
        found = loss_prompts(past, config, 0)
        assert found.rephrases == [sequence for turn in past for sequence in turn.rephrases]
        tokens = [len(sequence.answer) for sequence in found.rephrases]
        total = sum(weight * count for weight, count in zip(found.of_rephrases, tokens, strict=True))
        assert total == pytest.approx(1 + 0.95 + 0.95**2)  # each turn is one micro-batch
        total = sum(w * len(s.answer) for w, s in zip(found.of_unrelated, found.unrelated, strict=True))
        assert total == pytest.approx(0.6 * (1 + 0.95 + 0.95**2))

    def test_a_sample_is_the_whole_in_the_mean(self, tokenizer):
        past, config = self.turns(tokenizer)
        whole = loss_prompts(past, config, 0)
        sampled = dataclasses.replace(config, past_sample=4)
        sums, draws = dict.fromkeys(map(id, whole.rephrases), 0.0), 3000
        for seed in range(draws):
            part = loss_prompts(past, sampled, seed)
            assert part.rephrases[:3] == past[0].rephrases and len(part.rephrases) == len(part.unrelated) == 7
            assert part.of_rephrases[:3] == whole.of_rephrases[:3]
            for sequence, weight in zip(part.rephrases, part.of_rephrases, strict=True):
                sums[id(sequence)] += weight / draws
        for sequence, weight in zip(whole.rephrases, whole.of_rephrases, strict=True):
            assert sums[id(sequence)] == pytest.approx(weight, rel=0.1)

    def test_without_unrelated_prompts(self, tokenizer):
        editor = make_hyper(tokenizer, locality_weight=0.0)
        found = loss_prompts(training_turns(editor, as_requests(TRAINING), False), editor.config, 0)
        assert found.unrelated == found.of_unrelated == []


class TestBadInput:
    @pytest.mark.parametrize(
        ("missing", "words"),
        [
            ("rephrase", "request 3 has no rephrase, the question in other words, which training"),
            ("locality_prompt", "request 3 has no locality_prompt, an unrelated prompt and its answer"),
            ("locality_target", "request 3 has no locality_target"),
        ],
    )
    def test_training_data_without_what_training_needs(self, missing, words, tokenizer):
        requests = [dict(one) for one in TRAINING]
        del requests[3][missing]
        editor = make_hyper(tokenizer)
        before = state_of(editor)
        with pytest.raises(ValueError, match=words):
            editor.train(requests)
        assert_same_bits(state_of(editor), before)
        if missing != "rephrase":
            make_hyper(tokenizer, locality_weight=0.0).train(requests[3:5], progress=False)
        with pytest.raises(ValueError, match="nothing to train on"):
            editor.train([])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"step_size": "auto"}, "step_size must be a number"),
            ({"rank": 0}, "rank must be a whole number"),
            ({"turns_per_step": 0}, "turns_per_step must be a whole number, at least 1, or None"),
            ({"discount": 0.0}, "discount must be greater than 0"),
            ({"locality_weight": -1.0}, "locality_weight must be at least 0"),
            ({"hypernetwork": ""}, "hypernetwork must be a file's name"),
            ({"clip_each_turn": 1}, "clip_each_turn must be true or false"),
        ],
    )
    def test_configs(self, changes, words):
        with pytest.raises(ValueError, match=words):
            se.RLEditConfig(**changes)

    def test_families(self):
        assert se.RLEditConfig.published("mistral-7b").edit_modules == ["model.layers.{17,18}.mlp.down_proj"]
        assert se.MALMENConfig.published("gpt2", turn_size=8).turn_size == 8
        with pytest.raises(ValueError, match=r"no published modules for the model family 'llama-3-8B'.*llama-3-8b"):
            se.RLEditConfig.published("llama-3-8B")

    def test_a_broken_stream_changes_nothing(self, tokenizer):
        editor = make_hyper(tokenizer, step_size=1e30)
        editor.checkpoint()
        before = state_of(editor) | fields_of(editor)
        with pytest.raises(ValueError):
            editor.train(TRAINING, progress=False)
        assert_same_bits(state_of(editor) | fields_of(editor), before)
        assert not any(field.requires_grad for field in fields_of(editor).values())

    def test_requests_are_read_as_everywhere(self, tokenizer):
        editor = make_hyper(tokenizer)
        editor.train(as_requests(TRAINING)[:5], progress=False)
