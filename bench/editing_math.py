"""The mathematics of a turn (statistics, whitening, ridge, applying the update) against the published formulation."""

from __future__ import annotations

import statistics

import torch

from common import Parts, finish, new_parser, start, summary, timed
from published import PublishedOptions
from published_math import published_statistics, published_turns
from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, ModuleEditor, WhiteningOptions, ridge_update
from synthetic import SHAPES, Source, grow, observe_rows

MODES = {"late": 1_000_000, "early": 30_000, "exact": 1_000_000}
STEP_SIZE, RIDGE = 1e-6, 10.0


def main() -> None:
    parser = new_parser(
        "Times the editing mathematics at the shape of a model, ours and published, on synthetic keys and gradients "
        "(Gaussian; spectrum measured on SmolLM2).\nStatistics of a long stream are those of --base-rows rows, "
        "counted as often as nu asks.",
        "editing_math.py --shape mistral-7b --json bench/results/editing_math.json",
    )
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--modules", type=int, metavar="N", help="edited modules (default: as published for ZsRE)")
    parser.add_argument("--rows", type=int, default=400, metavar="N", help="answer tokens a turn (default 400)")
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="turns late and early (default 20)")
    parser.add_argument("--exact-turns", type=int, default=3, metavar="N", help="turns with exact refresh (default 3)")
    parser.add_argument("--published-turns", type=int, default=1, metavar="N", help="0 leaves it out (default 1)")
    parser.add_argument(
        "--published-modules", type=int, metavar="N", help="time so many of the modules and scale (default: all)"
    )
    parser.add_argument("--refresh", type=float, default=0.1, metavar="X", help="as in StableEditConfig (default 0.1)")
    parser.add_argument(
        "--base-rows", type=int, default=10_000, metavar="N", help="rows drawn at first (default 10000)"
    )
    options = parser.parse_args()
    device = start(options)
    key_dim, value_dim, modules = SHAPES[options.shape]
    options.modules = options.modules or modules

    source = Source(key_dim, value_dim, device)
    base = make_normalizer(key_dim, value_dim, options.refresh)
    observe_rows(base, source, options.base_rows)
    weights = [0.02 * torch.randn(value_dim, key_dim, device=device) for _ in range(options.modules)]
    runs = {}
    for mode, nu in MODES.items():
        refresh = 0.0 if mode == "exact" else options.refresh
        normalizer = grow(make_normalizer(key_dim, value_dim, refresh), base, nu)
        turns = options.exact_turns if mode == "exact" else options.turns
        runs[mode] = our_turns(source, normalizer, weights, options.rows, turns, device)
    products = dense_products(source, weights, options.rows, device)
    results = {
        "shape": {"k": key_dim, "v": value_dim, "modules": options.modules, "rows": options.rows},
        "dense_products_ms": sum(products.values()),
        "late_over_dense_products": runs["late"]["ms_per_turn"] / sum(products.values()),
        "dense_products": products,
        "ours": runs,
    }
    if options.published_turns:
        measured = min(options.published_modules or options.modules, options.modules)
        settings = PublishedOptions(step_size=STEP_SIZE, ridge=RIDGE)
        published = published_turns(
            source,
            published_statistics(base, MODES["late"], device),
            weights,
            settings,
            modules=measured,
            rows=options.rows,
            turns=options.published_turns,
        )
        ratios = {f"speedup_{mode}": published["ms_per_turn"] / run["ms_per_turn"] for mode, run in runs.items()}
        ours = max(run["peak_bytes"] for run in runs.values())
        ratios["memory_ratio"] = ours / published["peak_bytes"] if published["peak_bytes"] > 0 else None
        results = {**ratios, **results, "published": published}
    finish("editing_math", options, device, results)


def make_normalizer(key_dim: int, value_dim: int, refresh: float) -> LifelongNormalizer:
    return LifelongNormalizer(key_dim, value_dim, whitening=WhiteningOptions(refresh=refresh))


def our_turns(
    source: Source,
    normalizer: LifelongNormalizer,
    weights: list[torch.Tensor],
    rows: int,
    turns: int,
    device: torch.device,
) -> dict[str, object]:
    """Averages over turns. The first turn always decomposes: no whitener is kept from before."""
    editors = [ModuleEditor(normalizer, step_size=STEP_SIZE, ridge=RIDGE) for _ in weights]
    nu = normalizer.count
    records, norms = [], []
    for turn in range(turns):
        keys, gradients = source.turn(len(weights), rows)
        parts = Parts(device, trim=turn == 0)
        before = normalizer.copy()  # as the editor keeps one, to undo a turn that fails
        parts.run("observe", normalizer.observe, keys, gradients)
        # One row is enough to have the whitener renewed where that is due.
        parts.run("decomposition", normalizer.normalize_value_gradients, gradients[0][:1])
        updates: list[LowRankUpdate] = []
        for editor, h, g in zip(editors, keys, gradients, strict=True):
            targets = parts.run("targets", editor.targets, h, g)
            updates.append(parts.run("ridge", ridge_update, h, targets, RIDGE))
        for update, weight in zip(updates, weights, strict=True):
            parts.run("apply", update.add_to, weight)
        records.append(parts)
        norms.append(sum(timed(device, update.norm)[1] for update in updates))
        del before, updates, update, targets
    return {
        **summary(records),
        "turns": turns,
        "decompositions": normalizer.decompositions,
        "nu": [nu, normalizer.count],
        "ms_by_turn": [1000 * sum(record.seconds.values()) for record in records],
        "not_counted": {"update_norms_of_the_report_ms": 1000 * statistics.mean(norms)},
    }


def dense_products(
    source: Source, weights: list[torch.Tensor], rows: int, device: torch.device, repeats: int = 3
) -> dict[str, float]:
    """Milliseconds of the bare products that one turn of all modules cannot do without, medians."""
    keys, gradients = source.turn(len(weights), rows)
    pooled, h, g, weight = torch.cat(gradients), keys[0], gradients[0], weights[0]
    dim = g.shape[1]
    root, inverse = torch.randn(dim, dim, device=device), torch.randn(rows, rows, device=device).double()
    left = 1e-9 * torch.randn(dim, rows, device=device)
    v64 = g.double()

    def scatter() -> None:  # the upper triangle, in blocks
        for begin in range(0, dim, 512):
            torch.mm(pooled[:, begin : begin + 512].T, pooled[:, begin:])

    once = {"scatter": scatter}
    by_module = {
        "whitening": lambda: torch.mm(g, root),
        "dual_gram": lambda: torch.mm(h, h.T),
        "solve": lambda: torch.mm(inverse, v64),
        "apply": lambda: weight.addmm_(left, h),
    }
    result = {}
    for name, product in (once | by_module).items():
        seconds = [timed(device, product)[1] for _ in range(repeats + 1)][1:]
        result[name] = 1000 * statistics.median(seconds) * (1 if name in once else len(weights))
    return result


if __name__ == "__main__":
    main()
