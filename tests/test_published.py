"""The ``published`` presets against a plain re-implementation of the published procedures, step by step.

Nothing below shares code with the package: labels with -100, full logits, a backward pass through the whole model for
each micro-batch, running statistics fed one micro-batch and module at a time, ``eigh`` for each module, a dense k x k
solve, the arithmetic in the model's dtype.
"""

from __future__ import annotations

import random

import pytest
import torch

import stableedit_cpp as se
from support.tiny import tiny_model

# Two modules of one shape (24 -> 16, pooled) and one of another (16 -> 16).
MODULES = {
    "llama": ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"],
    "gpt2": ["transformer.h.1.mlp.c_proj", "transformer.h.2.attn.c_proj", "transformer.h.2.mlp.c_proj"],
}
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
STEP_SIZE = 3e-3


def stream(count: int, seed: int) -> list[dict[str, str]]:
    """Requests of mixed length, with many ties, so that the stable sort matters."""
    source = random.Random(seed)

    def word(low: int, high: int) -> str:
        return "".join(source.choices("abcdefghijklmnopqrstuvwxyzABCDE", k=source.randint(low, high)))

    return [{"prompt": f"{word(2, 9)} {word(3, 12)}", "target": word(1, 6)} for _ in range(count)]


class Published:
    """The published procedures for a list of modules: ``stable=True`` is StableEdit, else ULTRAEDIT."""

    def __init__(self, model, tokenizer, names: list[str], *, stable: bool, step_size: float) -> None:
        self.model, self.tokenizer, self.stable, self.step_size = model, tokenizer, stable, step_size
        self.ridge = 10.0 if stable else 1.0
        self.modules = {name: model.get_submodule(name) for name in names}
        self.statistics: dict[tuple, dict] = {}
        self.modes: list[set[str]] = []  # by turn
        self.lowest = float("inf")  # smallest eigenvalue of the last full whitening

    def run(self, requests: list[dict[str, str]], turn_size: int, *, warm_up: bool = False) -> None:
        for begin in range(0, len(requests), turn_size):
            self.turn(requests[begin : begin + turn_size], warm_up)

    def turn(self, requests: list[dict[str, str]], warm_up: bool) -> None:
        texts = []
        for request in requests:
            prompt = self.tokenizer(request["prompt"])["input_ids"]
            answer = self.tokenizer(" " + request["target"], add_special_tokens=False)["input_ids"]
            texts.append(((prompt + answer)[:-1], [-100] * (len(prompt) - 1) + answer))
        texts.sort(key=lambda pair: len(pair[0]), reverse=True)

        captured: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in self.modules}
        for begin in range(0, len(texts), 10):
            for name, pair in self.micro_batch(texts[begin : begin + 10]).items():
                captured[name].append(pair)
                self.fold(*pair)

        self.modes.append(set())
        with torch.no_grad():
            for name, module in self.modules.items():
                keys = torch.cat([h for h, _ in captured[name]])
                gradients = torch.cat([g for _, g in captured[name]])
                targets = self.targets(keys, gradients, warm_up)
                gram = keys.T @ keys + self.ridge * torch.eye(keys.shape[1], dtype=keys.dtype)
                change = torch.linalg.solve(gram, keys.T @ targets)
                module.weight += change if type(module).__name__ == "Conv1D" else change.T

    def micro_batch(self, texts: list[tuple[list[int], list[int]]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        longest = max(len(ids) for ids, _ in texts)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in texts])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in texts])
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def remember(name: str):
            def hook(_module, inputs, output) -> None:
                output.retain_grad()
                seen[name] = (inputs[0], output)

            return hook

        handles = [module.register_forward_hook(remember(name)) for name, module in self.modules.items()]
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        for handle in handles:
            handle.remove()
        self.model.zero_grad()
        answers = labels != -100
        return {name: (h[answers].detach(), out.grad[answers]) for name, (h, out) in seen.items()}

    def fold(self, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        state = self.statistics.setdefault((keys.shape[1], gradients.shape[1]), {"n": 0})
        new = len(keys)
        old = state["n"]
        state["n"] = old + new
        for name, x in (("h", keys), ("g", gradients)):
            mean, m2, outer = state.get(name, (0.0, 0.0, 0.0))
            delta = x.mean(0) - mean
            between = old * new / (old + new)
            centred = x - x.mean(0)
            m2 = m2 + new * x.var(0, unbiased=not self.stable) + between * delta**2
            outer = outer + centred.T @ centred + between * torch.outer(delta, delta)
            state[name] = (mean + new / (old + new) * delta, m2, outer)

    def targets(self, keys: torch.Tensor, gradients: torch.Tensor, warm_up: bool) -> torch.Tensor:
        state = self.statistics[keys.shape[1], gradients.shape[1]]
        eps = torch.finfo(keys.dtype).eps
        n, width = state["n"], gradients.shape[1]
        h_mean, h_m2, _ = state["h"]
        h_hat = (keys - h_mean) / ((h_m2 / (n - 1 + eps)).sqrt() + eps)
        mean, m2, psi = state["g"]
        if self.stable and not warm_up and n > width + 1:
            self.modes[-1].add("full")
            values, vectors = torch.linalg.eigh(psi / (n - width - 1))
            self.lowest = values.min().item()
            g_hat = (gradients - mean) @ vectors @ torch.diag(values.clamp(min=1e-6) ** -0.5) @ vectors.T
        else:
            self.modes[-1].add("diagonal")
            g_hat = (gradients - mean) / ((m2 / (n - 1 + eps)).sqrt() + eps)
        return -self.step_size * (h_hat**2).sum(1, keepdim=True) * g_hat


def weights_of(model, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in names}


def assert_same_changes(before, model, reference, dtype: torch.dtype, least: float = 0.05) -> None:
    """Compare the weight changes, which must be at least a share ``least`` of the weights."""
    after, expected = weights_of(model, list(before)), weights_of(reference, list(before))
    for name, start in before.items():
        ours, theirs = (after[name] - start).double(), (expected[name] - start).double()
        assert theirs.norm() > least * start.norm(), name
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{name} {dtype}: relative difference {difference:.1e}")
        assert difference < TOLERANCE[dtype], (name, difference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", MODULES)
def test_stableedit_is_the_published_procedure(architecture, dtype, tokenizer):
    """Two diagonal warm-up turns, then two full ones and an incomplete full one, which is edited as well."""
    names = MODULES[architecture]
    warm_up, edits = stream(70, seed=1), stream(85, seed=2)
    model, reference = tiny_model(architecture, dtype), tiny_model(architecture, dtype)
    before = weights_of(model, names)

    config = se.StableEditConfig.published(edit_modules=names, step_size=STEP_SIZE, turn_size=35)
    editor = se.StableEdit(model, tokenizer, config)
    warm_up_report, report = editor.warm_up(warm_up), editor.edit(edits)

    published = Published(reference, tokenizer, names, stable=True, step_size=STEP_SIZE)
    published.run(warm_up, 35, warm_up=True)
    published.run(edits, 35)

    assert [turn.requests for turn in report.turns] == [35, 35, 15]
    modes = [set(turn.whitening.values()) for turn in warm_up_report.turns + report.turns]
    assert modes == published.modes == [{"diagonal"}] * 2 + [{"full"}] * 3
    assert_same_changes(before, model, reference, dtype)


@pytest.mark.parametrize("architecture", MODULES)
def test_stableedit_without_warm_up_starts_diagonal(architecture, tokenizer):
    """Full whitening begins with the first turn after which n > v + 1 = 17."""
    names = MODULES[architecture][:1]
    edits = [{"prompt": f"Question {index}", "target": "xyz"} for index in range(8)]  # 4 tokens each
    edits.append({"prompt": "The last question", "target": "x"})
    model, reference = tiny_model(architecture, torch.float64), tiny_model(architecture, torch.float64)
    before = weights_of(model, names)
    config = se.StableEditConfig.published(edit_modules=names, step_size=1e-2, turn_size=2)
    report = se.StableEdit(model, tokenizer, config).edit(edits)

    published = Published(reference, tokenizer, names, stable=True, step_size=1e-2)
    published.run(edits, 2)
    modes = [set(turn.whitening.values()) for turn in report.turns]
    assert modes == published.modes == [{"diagonal"}] * 2 + [{"full"}] * 3  # n = 8, 16, 24, 32, 34
    assert_same_changes(before, model, reference, torch.float64)


def test_the_absolute_floor_is_exercised(tokenizer):
    """A small output embedding makes small gradients: eigenvalues below 1e-6, which are raised to it."""
    names = MODULES["llama"]
    edits = stream(60, seed=3)
    model, reference = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    for each in (model, reference):
        each.lm_head.weight.data.mul_(0.05)
    before = weights_of(model, names)
    config = se.StableEditConfig.published(edit_modules=names, step_size=STEP_SIZE, turn_size=30)
    se.StableEdit(model, tokenizer, config).edit(edits)
    published = Published(reference, tokenizer, names, stable=True, step_size=STEP_SIZE)
    published.run(edits, 30)
    assert published.lowest < 1e-6
    assert_same_changes(before, model, reference, torch.float64, least=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", MODULES)
def test_ultraedit_is_the_published_procedure(architecture, dtype, tokenizer):
    names = MODULES[architecture]
    edits = stream(85, seed=4)
    model, reference = tiny_model(architecture, dtype), tiny_model(architecture, dtype)
    before = weights_of(model, names)
    config = se.UltraEditConfig.published(edit_modules=names, step_size=STEP_SIZE, turn_size=35)
    report = se.UltraEdit(model, tokenizer, config).edit(edits)

    published = Published(reference, tokenizer, names, stable=False, step_size=STEP_SIZE)
    published.run(edits, 35)
    assert [set(turn.whitening.values()) for turn in report.turns] == published.modes == [{"diagonal"}] * 3
    assert_same_changes(before, model, reference, dtype)


def test_exact_ultraedit_statistics_differ_from_the_published_ones(tokenizer):
    """The comparison above is fine enough to tell the two variances apart."""
    names = MODULES["llama"]
    edits = stream(60, seed=5)
    changes = []
    for unbiased in (True, False):
        model = tiny_model("llama", torch.float64)
        before = weights_of(model, names)
        config = se.UltraEditConfig.published(
            edit_modules=names, step_size=STEP_SIZE, turn_size=30, unbiased_batches=unbiased
        )
        se.UltraEdit(model, tokenizer, config).edit(edits)
        changes.append(weights_of(model, names)[names[0]] - before[names[0]])
    assert (changes[0] - changes[1]).norm() > 10 * TOLERANCE[torch.float64] * changes[0].norm()
