"""Targets of MEMIT and AlphaEdit: all of a turn in one search, beside one request after the other as released."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from common import finish, new_parser, start, synchronize
from stableedit_cpp.editors.contexts import sample_contexts
from stableedit_cpp.editors.families import located_modules
from stableedit_cpp.editors.locating import Locator
from stableedit_cpp.editors.memit import MEMITConfig
from stableedit_cpp.editors.stream import names_of
from stableedit_cpp.editors.targets import LocatedFact
from stableedit_cpp.model.form import RAW
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.tokens import collate
from workload import add_model_options, pretrained, zsre


def main() -> None:
    parser = new_parser(
        "Times the search of targets z for the requests of a turn: all at once, as MEMIT and AlphaEdit do it, and\n"
        "one after the other as their released code does: seven texts of one request a batch, all of the model in\n"
        "each step, logits at all tokens from the model for KL and once more for the loss, torch.optim.Adam. Says how\n"
        "far the two are from each other.",
        "located_targets.py --requests 100 --threads 1 --json bench/results/located_targets.json",
    )
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="of ZsRE in the turn (default 100)")
    parser.add_argument("--plain", type=int, metavar="N", help="time the plain loop for so many of them (default all)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of Adam, one less (default 25)")
    options = parser.parse_args()
    device = start(options)
    model, tokenizer, _ = pretrained(options, device)
    requests = zsre(options, options.requests)
    config = MEMITConfig(target_steps=options.steps, chat_template=False, end_of_answer=False)
    modules = find_modules(model, options.edit_modules or located_modules(model))
    locator = Locator(model, tokenizer, modules, RAW, config, sample_contexts(model, tokenizer))
    names = names_of(requests)
    facts = locator.facts(requests, locator.prefixes(requests, names), names)

    clock = _clock(device)
    begin = clock()
    found = locator.targets(facts, names)
    ours = (clock() - begin) / len(facts)
    chosen = facts[: options.plain or len(facts)]
    begin = clock()
    plain = [plain_target(model, locator.layer, fact, config) for fact in chosen]
    theirs = (clock() - begin) / len(chosen)

    z = torch.stack([one for one, _ in plain])
    results = {
        "requests": len(facts),
        "speedup": theirs / ours,
        "clock": "processor" if device.type == "cpu" else "wall",
        "seconds_a_request": {"ours": ours, "released": theirs},
        "seconds_for_all": {"ours": ours * len(facts), "released": theirs * len(facts)},
        "released_requests_timed": len(chosen),
        "steps": {"ours": found.steps.double().mean().item(), "released": sum(s for _, s in plain) / len(plain)},
        "loss": found.losses.mean().item(),
        "modules": [module.name for module in modules],
        "relative_difference": {
            "median": ((found.z[: len(z)] - z).norm(dim=1) / z.norm(dim=1)).median().item(),
            "largest": ((found.z[: len(z)] - z).norm(dim=1) / z.norm(dim=1)).max().item(),
        },
    }
    finish("located_targets", options, device, results)


def _clock(device: torch.device) -> Callable[[], float]:
    """Processor seconds on the CPU, where other work would count in those of a clock on the wall."""

    def clock() -> float:
        synchronize(device)
        return time.process_time() if device.type == "cpu" else time.perf_counter()

    return clock


def plain_target(model: nn.Module, above: nn.Module, fact: LocatedFact, how: MEMITConfig) -> tuple[torch.Tensor, int]:
    """z of one request as released (``compute_z``), and the steps that it took."""
    sequences = [*fact.texts, fact.about]
    ends = torch.tensor([*fact.ends, len(fact.about) - 1])
    device = next(model.parameters()).device
    batch = collate(sequences, device)
    rows, state = torch.arange(len(sequences), device=device), {}
    model.requires_grad_(False)

    def change(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs["hidden_states"]
        if not state:
            state["z0"] = states[0, ends[0]].detach().clone()
            state["delta"] = torch.zeros_like(state["z0"]).requires_grad_()
        states = states.clone()
        states[rows, ends.to(device)] += state["delta"]
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

    head = model.get_output_embeddings()
    handles = [
        above.register_forward_pre_hook(change, with_kwargs=True),
        head.register_forward_pre_hook(lambda _module, args: state.update(last=args[0])),
    ]
    optimizer, before, taken = None, None, 0
    for step in range(how.target_steps):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        delta, z0 = state["delta"], state["z0"]
        optimizer = optimizer or torch.optim.Adam([delta], lr=how.target_learning_rate)
        optimizer.zero_grad()
        log = head(state["last"][: len(fact.texts)]).log_softmax(-1)
        loss = _loss(log, sequences, fact) + how.target_decay * delta.norm() / z0.norm() ** 2
        after = logits[-1, len(fact.about) - 1].log_softmax(-1)
        before = after.detach() if before is None else before
        loss = loss + how.target_kl * F.kl_div(before, after, log_target=True, reduction="sum")
        if loss < how.target_loss or step == how.target_steps - 1:
            break
        loss.backward()
        optimizer.step()
        taken += 1
        most = how.target_clamp * z0.norm()
        if delta.norm() > most:
            with torch.no_grad():
                delta.mul_(most / delta.norm())
    for handle in handles:
        handle.remove()
    return (state["z0"] + state["delta"]).detach(), taken


def _loss(log: torch.Tensor, sequences: Sequence, fact: LocatedFact) -> torch.Tensor:
    """Mean over the texts of the mean cross-entropy of the target's tokens."""
    each = []
    for row in range(len(fact.texts)):
        text = sequences[row]
        labels = torch.tensor(text.answer, device=log.device)[:, None]
        each.append(-log[row, text.first : len(text)].gather(1, labels).mean())
    return torch.stack(each).mean()


if __name__ == "__main__":
    main()
