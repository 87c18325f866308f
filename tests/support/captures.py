"""Sequences to capture, and the plain loop that a capture is compared with."""

from __future__ import annotations

import torch

from stableedit_cpp.model.tokens import tokenize
from support.tiny import FACTS

MICRO_BATCH = 5


def sequences_of(tokenizer, facts=FACTS):
    return tokenize(tokenizer, [(fact["prompt"], fact["target"]) for fact in facts], 64, [""] * len(facts))


def plain_reference(model, sequences, modules: list[str], *, prompt_rows: bool = False):
    """Micro-batch by micro-batch: mean cross-entropy over its answer tokens, one request at a time, whole backward.
    With ``prompt_rows`` all rows but the first of each request.

    Returns keys and value gradients by module, request and position of each row.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
    keys = {name: [] for name in modules}
    gradients = {name: [] for name in modules}
    for begin in range(0, len(order), MICRO_BATCH):
        members = order[begin : begin + MICRO_BATCH]
        tokens = sum(len(sequences[index].answer) for index in members)
        for index in members:
            ids, answer = sequences[index].ids, sequences[index].answer
            seen = {}

            def hook(module, inputs, output, seen=seen):
                output.retain_grad()
                seen[module] = (inputs[0], output)

            handles = [model.get_submodule(name).register_forward_hook(hook) for name in modules]
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, len(ids) - len(answer) :]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum") / tokens
            loss.backward()
            for handle in handles:
                handle.remove()
            count = len(ids) - 1 if prompt_rows else len(answer)
            for name in modules:
                h, out = seen[model.get_submodule(name)]
                keys[name].append(h.reshape(len(ids), -1)[-count:].detach())
                gradients[name].append(out.grad.reshape(len(ids), -1)[-count:])
    model.zero_grad()
    join = {name: torch.cat(rows) for name, rows in keys.items()}
    return join, {name: torch.cat(rows) for name, rows in gradients.items()}


def flags_of(model) -> list[bool]:
    return [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]
