"""Facts with subjects, and the plain search for a target: one request at a time, the whole model each step."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from stableedit_cpp.model.modules import EditModule

FACTS = [
    {"id": "a", "prompt": "The capital of Peru is", "target": "Lima", "subject": "Peru"},
    {"id": "b", "prompt": "Gold is", "target": "Au", "subject": "gold"},
    {"id": "c", "prompt": "He who wrote Faust:", "target": "Goethe", "subject": "Faust"},
    {"id": "d", "prompt": "Largest planet:", "target": "Jupiter", "subject": "planet"},
    {"id": "e", "prompt": "Snow is", "target": "white", "subject": "Snow"},
]
CONTEXTS = ["The sea. ", "I see. "]


def options(**changes) -> SimpleNamespace:
    """Of the search: the published ones, with a step that tiny models feel."""
    published = {"target_steps": 12, "target_learning_rate": 0.5, "target_clamp": 0.75}
    return SimpleNamespace(**(published | {"target_kl": 0.0625, "target_decay": 0.5, "target_loss": 0.05} | changes))


def plain_target(model, layer, fact, how) -> tuple[torch.Tensor, int, float]:
    """z of one fact as released code has it (``compute_z``): every text in full, torch's own Adam.

    Args:
        layer: the one whose output is changed.

    Returns:
        z, the steps that it took, and its last loss.
    """
    delta, z0 = None, None

    def add(end):
        def hook(_module, _args, output):
            nonlocal delta, z0
            states = output[0] if isinstance(output, tuple) else output
            if delta is None:
                z0 = states[0, end].detach().clone()
                delta = torch.zeros_like(z0).requires_grad_()
            states = states.clone()
            states[0, end] += delta
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def logits(sequence, end):
        handle = layer.register_forward_hook(add(end))
        out = model(input_ids=torch.tensor([sequence.ids])).logits[0]
        handle.remove()
        return out

    logits(fact.texts[0], fact.ends[0])
    optimizer = torch.optim.Adam([delta], lr=how.target_learning_rate)
    before, taken = None, 0
    for step in range(how.target_steps):
        optimizer.zero_grad()
        each = []
        for sequence, end in zip(fact.texts, fact.ends, strict=True):
            log = logits(sequence, end).log_softmax(-1)[sequence.first :]
            each.append(-log.gather(1, torch.tensor(sequence.answer)[:, None]).mean())
        after = logits(fact.about, len(fact.about) - 1).log_softmax(-1)[-1]
        before = after.detach() if before is None else before
        kl = F.kl_div(before, after, log_target=True, reduction="sum")
        loss = torch.stack(each).mean() + how.target_kl * kl + how.target_decay * delta.norm() / z0.norm() ** 2
        if loss < how.target_loss or step == how.target_steps - 1:
            break
        loss.backward()
        optimizer.step()
        taken += 1
        most = how.target_clamp * z0.norm()
        if delta.norm() > most:
            with torch.no_grad():
                delta.mul_(most / delta.norm())
    return (z0 + delta).detach(), taken, loss.item()


def layer_module(model, name: str) -> EditModule:
    """A layer as trunk caches take their modules: by its name."""
    return EditModule(name, model.get_submodule(name))
