"""What a turn of rival editors costs in their released formulation, and in ours: the same updates."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from common import Parts, finish, new_parser, start
from stableedit_cpp.core import LowRankUpdate, NullSpace, PastKeys, ridge_update
from stableedit_cpp.editors.hypernetwork.implicit import PassedThrough
from synthetic import Source

L2 = 10.0  # AlphaEdit's ridge
WEIGHT = 15_000.0  # MEMIT's of C0
REMOVED = 0.3  # share of the directions that text uses, as AlphaEdit finds on Llama-3-8B
FILLS = (1 / 6, 1 / 2, 5 / 6)  # of the k / 4 keys until a factorisation: midpoints of three thirds


def main() -> None:
    parser = new_parser(
        "Times one turn at one module: AlphaEdit, MEMIT and the gradient of MALMEN's and RLEdit's hypernetworks, as\n"
        "released and ours, on synthetic keys, in one process. What ours does once in many turns is shared out.",
        "rivals_math.py --json bench/results/rivals_math.json",
    )
    parser.add_argument("--key-dim", type=int, default=14336, metavar="K", help="default 14336, Llama-3-8B's MLP")
    parser.add_argument("--value-dim", type=int, default=4096, metavar="V", help="default 4096")
    parser.add_argument("--edits", type=int, default=100, metavar="N", help="requests a turn, a key each (default 100)")
    parser.add_argument(
        "--rows", type=int, default=400, metavar="N", help="answer tokens a turn, of the hypernetworks (default 400)"
    )
    parser.add_argument(
        "--loss-rows", type=int, default=4000, metavar="N", help="tokens of all prompts of their loss (default 4000)"
    )
    parser.add_argument("--sketch-rank", type=int, default=512, metavar="R", help="of the past keys (default 512)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of ours (default 3)")
    parser.add_argument("--released-repeats", type=int, default=1, metavar="N", help="default 1")
    options = parser.parse_args()
    device = start(options)
    source = Source(options.key_dim, options.value_dim, device)

    results = {
        "alphaedit": alphaedit(source, options),
        "memit": memit(source, options),
        "hypernetwork_gradient": hypernetwork(source, options),
    }
    found = {}
    for name, part in results.items():
        released = part["released"]
        for ours in (key for key in part if key not in ("released", "difference")):
            one = name if ours == "ours" else f"{name}_{ours}"
            found[f"{one}_speedup"] = released["ms_per_turn"] / part[ours]["ms_per_turn"]
            found[f"{one}_memory"] = part[ours]["bytes"] / released["bytes"]
    finish("rivals_math", options, device, found | results)


def measured(run: Callable[[Parts], object], device: torch.device, repeats: int, state: int) -> dict[str, object]:
    """Medians over repeats of what the parts of a turn take.

    Args:
        run: a turn, in parts. state: bytes that stay from turn to turn, beside the weight.
    """
    records = []
    for _ in range(repeats):
        parts = Parts(device, trim=True)
        run(parts)
        records.append(parts)
    by_part = {name: 1000 * statistics.median(r.seconds[name] for r in records) for name in records[0].seconds}
    working = max(max(record.peak.values()) for record in records)
    return {
        "ms_per_turn": sum(by_part.values()),
        "ms_by_part": by_part,
        "state_bytes": state,
        "working_bytes": working,
        "bytes": state + working,
    }


def alphaedit(source: Source, options) -> dict[str, object]:
    """solve(P (K K^T + Cp) + L2 I, P K R^T), dense, against projected rows and the ridge with past keys."""
    space = null_space(options.key_dim, source)
    history = source.keys(options.key_dim // 4 + 1)  # of earlier turns
    turn = source.keys(options.edits), source.gradients(options.edits)
    weight = 0.02 * torch.randn(options.value_dim, options.key_dim, device=source.device)
    released, expected = released_alphaedit(space, history, options, *turn, weight)
    projected, parts = space.project(history), Parts(source.device)
    folded = PastKeys(options.key_dim)
    parts.run("fold", folded.update, projected)  # more than k / 4 keys: they become C at once
    parts.run("factorise", lambda: folded.solve(projected[:1], weight=1.0, ridge=L2))
    shared = 1000 * sum(parts.seconds.values()) / max(options.key_dim / 4 / options.edits, 1.0)
    update = our_turn(Parts(source.device), space, folded.copy(), *turn, weight)
    difference = float((update.dense() - expected).norm() / expected.norm())
    del expected, update
    arguments = space, source, options, *turn, weight
    return {
        "released": released,
        "exact": exact_turns(PastKeys(options.key_dim), *arguments),
        "exact_later": exact_turns(folded, *arguments, shared=shared),
        "sketch": sketched_turns(space, projected, source, options, *turn, weight),
        "difference": difference,
    }


def released_alphaedit(
    space: NullSpace, history: torch.Tensor, options, keys: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[dict[str, object], torch.Tensor]:
    """What it takes, and the update."""
    device = keys.device
    identity = torch.eye(options.key_dim, device=device)
    dense = space.project(identity)  # P, as released: a matrix
    del identity
    cache, columns = history.T @ history, keys.T

    def run(parts: Parts) -> torch.Tensor:
        system = parts.run(
            "system", lambda: dense @ (columns @ columns.T + cache) + L2 * torch.eye(len(dense), device=device)
        )
        update = parts.run("solve", lambda: torch.linalg.solve(system, dense @ columns @ residual))
        parts.run("apply", lambda: weight.add_(1e-9 * update.T))
        parts.run("past", lambda: cache.add_(columns @ columns.T))
        return update

    found: list[torch.Tensor] = []
    figures = measured(lambda parts: found.append(run(parts)), device, options.released_repeats, bytes_of(dense, cache))
    return figures, found[0].T


def null_space(dim: int, source: Source) -> NullSpace:
    """Of random directions: at k = 14336 a decomposition, once a model, takes longer than all that is timed here."""
    removed = torch.linalg.qr(torch.randn(dim, round(REMOVED * dim), device=source.device))[0]
    state = {"basis": removed, "complement": torch.tensor(1), "threshold": torch.tensor(2e-2, dtype=torch.float64)}
    return NullSpace.from_state_dict(state)


def our_turn(
    parts: Parts, space: NullSpace, past: PastKeys, keys: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> LowRankUpdate:
    rows = parts.run("project", space.project, keys)
    update = parts.run("ridge", lambda: ridge_update(rows, residual, L2, past_keys=past, past_key_weight=1.0))
    parts.run("apply", lambda: update.scaled(1e-9).add_to(weight))
    # The keys after the turn are measured anew, so they are projected again.
    parts.run("past", lambda: past.update(space.project(keys)))
    return update


def exact_turns(
    before: PastKeys, space: NullSpace, source: Source, options, *turn: torch.Tensor, shared: float = 0.0
) -> dict[str, object]:
    """The mean over the turns until k / 4 keys have come to those that ``before`` holds.

    Args:
        shared: milliseconds of what comes once in so many turns, for each of them.
    """
    k, n = options.key_dim, options.edits
    runs = []
    for fill in FILLS:
        past, rows = before.copy(), max(int(fill * (k // 4)) - n, 1)
        past.update(space.project(source.keys(rows)))
        past.solve(turn[0][:1], weight=1.0, ridge=L2)
        past.update(space.project(source.keys(n)))  # those of the turn before

        def run(parts: Parts, past: PastKeys = past) -> None:
            our_turn(parts, space, past.copy(), *turn)

        # Beside rows and what there is of C: their solutions, and its factor.
        factor = 4 * k * k if before.factorisations else 0
        state = bytes_of(space.basis, *past.state_dict().values()) + 4 * (rows + n) * k + factor
        runs.append(measured(run, source.device, options.repeats, state))
    by_part = {name: statistics.mean(run["ms_by_part"][name] for run in runs) for name in runs[0]["ms_by_part"]}
    if shared:
        by_part["fold_and_factorise"] = shared
    largest = max(runs, key=lambda run: run["bytes"])
    return {**largest, "ms_per_turn": sum(by_part.values()), "ms_by_part": by_part}


def sketched_turns(
    space: NullSpace, projected: torch.Tensor, source: Source, options, *turn: torch.Tensor
) -> dict[str, object]:
    """Means over the turns from one shrinking of the sketch to the next."""
    past = PastKeys(options.key_dim, options.sketch_rank)
    for rows in projected.split(options.sketch_rank):
        past.update(rows)
    past.solve(projected[:1], weight=1.0, ridge=L2)
    turns = max(options.sketch_rank // options.edits, 1)

    def run(parts: Parts) -> None:
        for _ in range(turns):
            our_turn(parts, space, past, *turn)

    # Of at most 2 rank rows, and their solutions.
    state = bytes_of(space.basis) + 4 * 4 * options.sketch_rank * options.key_dim
    found = measured(run, source.device, options.repeats, state)
    by_part = {name: value / turns for name, value in found["ms_by_part"].items()}
    return {**found, "ms_per_turn": sum(by_part.values()), "ms_by_part": by_part}


def memit(source: Source, options) -> dict[str, object]:
    """solve(w C0 + K K^T, K) in float64, against past keys that begin with w C0: one factorisation a model."""
    k, v, n, device = options.key_dim, options.value_dim, options.edits, source.device
    some = source.keys(k // 4)
    moment = some.T @ some / len(some)
    moment.diagonal().add_(0.1 * moment.diagonal().mean())
    keys, residual = source.keys(n), source.gradients(n)
    weight = 0.02 * torch.randn(v, k, device=device)

    def released(parts: Parts) -> torch.Tensor:
        columns, targets = keys.T.double(), residual.T.double()
        adjusted = parts.run(
            "solve", lambda: torch.linalg.solve(WEIGHT * moment.double() + columns @ columns.T, columns)
        )
        update = parts.run("update", lambda: targets @ adjusted.T)
        parts.run("apply", lambda: weight.add_(1e-9 * update.float()))
        return update

    found: list[torch.Tensor] = []
    figures = measured(lambda parts: found.append(released(parts)), device, options.released_repeats, bytes_of(moment))
    result, expected = {"released": figures}, found.pop(0)
    found.clear()
    result["difference"] = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        past = PastKeys.seeded(moment.to(dtype), WEIGHT)
        ridge = 1e-6 * WEIGHT * float(moment.diagonal().mean())
        once = Parts(device, trim=True)
        once.run("factorise", lambda past=past, ridge=ridge: past.solve(keys[:1], weight=1.0, ridge=ridge))

        def ours(parts: Parts, past: PastKeys = past, ridge: float = ridge) -> LowRankUpdate:
            update = parts.run(
                "ridge", lambda: ridge_update(keys, residual, ridge, past_keys=past, past_key_weight=1.0)
            )
            parts.run("apply", lambda: update.scaled(1e-9).add_to(weight))
            return update

        difference = ours(Parts(device)).dense().double() - expected
        result["difference"][name] = float(difference.norm() / expected.norm())
        state = k * k * dtype.itemsize  # C and its factor, in one matrix
        result[name] = measured(ours, device, options.repeats, state)
        result[name]["once_a_model_ms"] = 1000 * once.seconds["factorise"]
    return result


def hypernetwork(source: Source, options) -> dict[str, object]:
    """The gradient of a training loss with respect to the targets V: through k x k, against the dual form."""
    keys, targets = source.keys(options.rows), source.gradients(options.rows)
    loss_keys, loss_gradients = source.keys(options.loss_rows), source.gradients(options.loss_rows)
    update = ridge_update(keys, targets, 1.0)  # which both have at hand, the released code as a matrix
    released, expected = released_gradient(update.dense().T, options, keys, loss_keys, loss_gradients)

    def run(parts: Parts) -> torch.Tensor:
        through = PassedThrough(keys, update, 1.0)
        parts.run("loss", through.add, loss_keys, loss_gradients)
        return parts.run("gradient", through.gradients)[0]

    difference = float((run(Parts(source.device)) - expected).norm() / expected.norm())
    ours = measured(run, source.device, options.repeats, bytes_of(update.left, update.right))
    return {"released": released, "ours": ours, "difference": difference}


def released_gradient(
    solution: torch.Tensor, options, keys: torch.Tensor, loss_keys: torch.Tensor, loss_gradients: torch.Tensor
) -> tuple[dict[str, object], torch.Tensor]:
    """What it takes, and the gradient."""
    device = keys.device

    def run(parts: Parts) -> torch.Tensor:
        gradient = parts.run("weight_gradient", lambda: loss_keys.T @ loss_gradients)
        solved = parts.run(
            "solve",
            lambda: torch.linalg.solve(keys.T @ keys + torch.eye(options.key_dim, device=device), gradient),
        )
        parts.run("ridge_gradient", lambda: -(solved * solution).sum())
        return parts.run("targets_gradient", lambda: keys @ solved)

    found: list[torch.Tensor] = []
    figures = measured(lambda parts: found.append(run(parts)), device, options.released_repeats, bytes_of(solution))
    return figures, found[0]


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
