"""Past keys in the ridge: what a reused factorisation saves, and what a sketch loses."""

from __future__ import annotations

import statistics

import torch

from common import finish, memory_now, new_parser, start, timed
from stableedit_cpp.core import LowRankUpdate, PastKeys, ridge_update
from stableedit_cpp.model.capture import capture
from synthetic import SHAPES, Source
from workload import add_model_options, pretrained, token_sequences, zsre

WEIGHT, RIDGE = 0.02, 10.0


def main() -> None:
    parser = new_parser(
        "Times the ridge of a turn with past keys at the shape of a model (synthetic keys): with a fresh k x k\n"
        "factorisation every turn, with the reused one, and with Frequent Directions sketches. With --edits it also\n"
        "measures on real keys of ZsRE how far the updates of a sketch are from the exact ones.",
        "past_keys.py --shape smollm2-135m --edits 1000 --json bench/results/past_keys_smollm2.json",
    )
    add_model_options(parser)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--rows", type=int, default=400, metavar="N", help="answer tokens a turn (default 400)")
    parser.add_argument("--passes", type=int, default=3, metavar="N", help="solutions a turn (default 3)")
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="with the reused factor (default 20)")
    parser.add_argument("--fresh-turns", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 512, 1024], metavar="R")
    parser.add_argument("--edits", type=int, default=0, metavar="N", help="ZsRE requests for real keys (default none)")
    options = parser.parse_args()
    device = start(options)
    key_dim, value_dim, _ = SHAPES[options.shape]
    source = Source(key_dim, value_dim, device)
    results: dict[str, object] = {"k": key_dim, "v": value_dim}

    results["fresh"] = fresh(source, options)
    results["reused"] = reused(source, PastKeys(key_dim), options, options.turns)
    results["sketch"] = {
        rank: reused(source, PastKeys(key_dim, rank), options, options.turns) for rank in options.ranks
    }
    results["speedup"] = results["fresh"]["ms_per_turn"] / results["reused"]["ms_per_turn"]
    if options.edits:
        results["loss"] = loss(options, device)
    finish("past_keys", options, device, results)


def fresh(source: Source, options) -> dict[str, float]:
    """The formula as it stands: a new factor of weight C + ridge I each turn, in float32."""
    moment = torch.zeros(source.key_dim, source.key_dim, device=source.device)
    seconds = []
    for _ in range(options.fresh_turns):
        keys, targets = source.keys(options.rows), source.gradients(options.rows)

        def solve(keys=keys, targets=targets) -> None:
            system = WEIGHT * moment
            system.diagonal().add_(RIDGE)
            factor = torch.linalg.cholesky(system)
            for _ in range(options.passes):
                right = torch.cholesky_solve(keys.T, factor).T
                gram = (right @ keys.T).double()
                gram.diagonal().add_(1.0)
                torch.linalg.solve(gram, targets.double())
            moment.addmm_(keys.T, keys)

        seconds.append(timed(source.device, solve)[1])
    return {"ms_per_turn": 1000 * statistics.mean(seconds), "state_bytes": 2 * moment.numel() * 4}


def reused(source: Source, past: PastKeys, options, turns: int) -> dict[str, float]:
    """The editor's way, from the second turn on."""
    past.update(source.keys(options.rows))
    before, seconds = memory_now(source.device), []
    for _ in range(turns):
        keys, targets = source.keys(options.rows), source.gradients(options.rows)

        def solve(keys=keys, targets=targets) -> None:
            for _ in range(options.passes):
                ridge_update(keys, targets, RIDGE, past_keys=past, past_key_weight=WEIGHT)
            past.update(keys)

        seconds.append(timed(source.device, solve)[1])
    state = sum(t.numel() * t.element_size() for t in past.state_dict().values())
    return {
        "ms_per_turn": 1000 * statistics.mean(seconds),
        "max_ms": 1000 * max(seconds),
        "factorisations": past.factorisations,
        "state_bytes": state,
        "resident_bytes": memory_now(source.device) - before,
    }


def loss(options, device: torch.device) -> dict[str, dict]:
    """On real keys, after all but the last turn: how far a sketch's update is from the exact one, and how much of the
    exact one's protection of earlier keys (the disturbance that it takes away) the sketch keeps."""
    model, tokenizer, modules = pretrained(options, device)
    sequences = token_sequences(model, tokenizer, zsre(options, options.edits))
    turns = [
        capture(model, modules, sequences[i : i + 100], micro_batch=10, max_tokens=options.max_tokens)
        for i in range(0, len(sequences), 100)
    ]
    found: dict[str, dict] = {}
    for module in modules:
        keys = [captured.keys[module.name] for captured in turns]
        last, earlier = keys.pop(), torch.cat(keys)
        targets = -turns[-1].value_gradients[module.name]
        results = {}
        for rank in [None, *options.ranks]:
            past = PastKeys(module.shape[0], rank)
            for batch in keys:
                past.update(batch)
            results[rank] = past, ridge_update(last, targets, RIDGE, past_keys=past, past_key_weight=WEIGHT)
        moment, exact = results[None][0].second_moment, results[None][1]
        plain = ridge_update(last, targets, RIDGE)
        for rank in options.ranks:
            past, update = results[rank]
            found.setdefault(module.name, {})[rank] = {
                "moment_error": float(torch.linalg.matrix_norm(past.second_moment - moment, 2))
                / float(torch.linalg.matrix_norm(moment, 2)),
                "update_error": float((update.dense() - exact.dense()).norm() / exact.dense().norm()),
                "protection_kept": (disturbance(plain, earlier) - disturbance(update, earlier))
                / (disturbance(plain, earlier) - disturbance(exact, earlier)),
            }
        found[module.name]["keys"] = len(earlier)
        found[module.name]["disturbance_exact_over_plain"] = disturbance(exact, earlier) / disturbance(plain, earlier)
    return found


def disturbance(update: LowRankUpdate, keys: torch.Tensor) -> float:
    """Root mean square change of the module's output at earlier keys."""
    return float((update.left @ (update.right @ keys.T)).square().mean().sqrt())


if __name__ == "__main__":
    main()
