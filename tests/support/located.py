"""Facts with subjects, and the plain search for a target: one request at a time, the whole model each step."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from stableedit_cpp.editors.targets import LocatedFact
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.subjects import subject_prefixes
from stableedit_cpp.model.tokens import TokenSequence, tokenize

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
    published = {"target_steps": 8, "target_learning_rate": 0.5, "target_clamp": 0.75}
    return SimpleNamespace(**(published | {"target_kl": 0.0625, "target_decay": 0.5, "target_loss": 0.05} | changes))


def located(tokenizer, records=FACTS) -> list[LocatedFact]:
    """Facts in the contexts above."""
    facts = []
    for fact in records:
        contexts = ["", *CONTEXTS]
        (prefixes,) = subject_prefixes(tokenizer, [fact["prompt"]], [fact["subject"]], [""], contexts=contexts)
        pairs = [(context + fact["prompt"], fact["target"]) for context in contexts]
        texts = tokenize(tokenizer, pairs, 64, [""] * len(pairs))
        ((about,),) = subject_prefixes(tokenizer, [f"{fact['subject']} is a"], [fact["subject"]], [""])
        facts.append(LocatedFact(tuple(texts), tuple(len(p) - 1 for p in prefixes), TokenSequence(about, (0,))))
    return facts


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


def plain_inputs(model, names: list[str], ids) -> dict[str, torch.Tensor]:
    """What goes into modules, at every token."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.__setitem__(name, args[0].detach().reshape(len(ids), -1))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    for handle in handles:
        handle.remove()
    return seen


def plain_turn(model, facts, how, layers: str, modules: list[str], rule) -> None:
    """Edit a float64 model in place as released code does: z of each fact, then layer by layer keys and residuals.

    Args:
        layers: name of the list of layers. rule: of module, keys ``[n, k]`` and residuals ``[n, v]`` the change D.
    """
    last = int(modules[-1][len(layers) + 1 :].split(".")[0])
    z = torch.stack([plain_target(model, model.get_submodule(f"{layers}.{last}"), fact, how)[0] for fact in facts])
    above = f"{layers}.{last + 1}"
    for number, name in enumerate(modules):
        keys, now = [], []
        for fact in facts:
            each = []
            for text, end in zip(fact.texts, fact.ends, strict=True):
                ids = text.ids[: end + 1]
                seen = plain_inputs(model, [name, above], ids)
                each.append(seen[name][-1])
                if len(each) == 1:
                    now.append(seen[above][-1])
            keys.append(0.5 * each[0] + 0.5 * torch.stack(each[1:]).mean(0))
        keys, residuals = torch.stack(keys), (z - torch.stack(now)) / (len(modules) - number)
        weight = model.get_submodule(name).weight
        change = rule(name, keys, residuals)
        with torch.no_grad():
            weight += change if weight.shape == change.shape else change.T
