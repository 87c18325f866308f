"""Requests to train a hypernetwork with, networks that are not the identity, and the rule written out in float64."""

from __future__ import annotations

import torch

import stableedit_cpp as se
from stableedit_cpp.editors.hypernetwork.network import HyperNetwork
from support.captures import MICRO_BATCH
from support.editors import make
from support.tiny import FACTS

TRAINING = [
    fact
    | {
        "rephrase": f"Say: {fact['prompt']}",
        "locality_prompt": f"Who is no. {number}?",
        "locality_target": "no one" if number % 2 else "all",
    }
    for number, fact in enumerate(FACTS)
]
STEP = 2e-2


def make_hyper(tokenizer, model=None, *, editor=se.RLEdit, config=se.RLEditConfig, **changes):
    """Small enough to be quick, with a step that a tiny model notices."""
    settings = {"rank": 6, "step_size": STEP, "micro_batch": MICRO_BATCH, "learning_rate": 1e-3} | changes
    return make(tokenizer, model, editor=editor, config=config, **settings)


def fields_of(editor) -> dict[str, torch.Tensor]:
    (network,) = editor.solver.networks.values()
    return {name: field.clone() for name, field in network.fields.items()}


def stir(editor, seed: int = 0) -> None:
    """Let all parts of the networks count, and modules differ in step and ridge."""
    generator = torch.Generator().manual_seed(seed)
    for network in editor.solver.networks.values():
        fields = {}
        for name, field in network.fields.items():
            noise = torch.randn(field.shape, generator=generator, dtype=torch.float64).to(field)
            fields[name] = field + {"up": 0.05, "step": 0.3 * STEP}.get(name, 0.3) * noise
        network.restore(HyperNetwork(fields))


def plain_network(fields, x: torch.Tensor, module: int) -> torch.Tensor:
    """The blocks as the paper's code has them, one after the other."""
    y = x
    for block in range(len(fields["down"])):
        inner = y @ fields["down"][block] @ fields["up"][block] + fields["bias"][block]
        y = y + fields["scale"][block][module] * inner.clamp(0) + fields["shift"][block][module]
    return y


def plain_update(fields, module: int, keys, gradients, moments) -> torch.Tensor:
    """D ``[k, v]`` by a dense solution; differentiable in the fields.

    Args:
        moments: (mean, std) of keys, and of value gradients.
    """
    (mean, std), (gradient_mean, gradient_std) = moments
    eps = torch.finfo(keys.dtype).eps
    x = torch.cat([(keys - mean) / (std + eps), (gradients - gradient_mean) / (gradient_std + eps)], dim=1)
    y = plain_network(fields, x, module)
    k = keys.shape[1]
    targets = -fields["step"][module] * (keys * y[:, :k]).sum(1, keepdim=True) * y[:, k:]
    system = keys.T @ keys + fields["log_ridge"][module].exp() * torch.eye(k, dtype=keys.dtype)
    return torch.linalg.solve(system, keys.T @ targets)


class PlainMoments:
    """Mean and std of all rows so far; ``published`` adds n times the unbiased variance of each batch."""

    def __init__(self, published: bool = False) -> None:
        self.published = published
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One batch; returns mean and std."""
        n, mean = len(rows), rows.mean(0)
        spread = n * rows.var(0) if self.published else (rows - mean).square().sum(0)
        total = self.count + n
        self.m2 = self.m2 + spread + (mean - self.mean) ** 2 * self.count * n / total
        self.mean = self.mean + (mean - self.mean) * n / total
        self.count = total
        return self.mean, (self.m2 / (total - 1)).sqrt()
