"""A long stream of turns: does a turn cost the same at the end as at the beginning?"""

from __future__ import annotations

import statistics
from itertools import pairwise

import torch

from common import finish, memory_now, new_parser, start, timed
from stableedit_cpp.core import LifelongNormalizer, ModuleEditor, WhiteningOptions
from synthetic import Source

POOL = 64  # turns that are drawn in advance and then repeated


def main() -> None:
    parser = new_parser(
        "Edits one small weight with synthetic keys and gradients for many turns.\n"
        "Time and resident memory by decile of the stream, and how often the covariance was decomposed.",
        "scaling.py --turns 20000 --json bench/results/scaling.json",
    )
    parser.add_argument("--turns", type=int, default=20_000, metavar="N", help="10 to 20,000 (default 20000)")
    parser.add_argument("--key-dim", type=int, default=512, metavar="K")
    parser.add_argument("--value-dim", type=int, default=192, metavar="V")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="answer tokens a turn (default 64)")
    parser.add_argument("--refresh", type=float, default=0.1, metavar="X", help="as in StableEditConfig (default 0.1)")
    options = parser.parse_args()
    if options.turns < 10:
        parser.error("--turns must be at least 10: there are ten deciles")
    device = start(options)

    source = Source(options.key_dim, options.value_dim, device)
    pool = [(source.keys(options.rows), source.gradients(options.rows)) for _ in range(min(POOL, options.turns))]
    weight = torch.zeros(options.value_dim, options.key_dim, device=device)
    normalizer = LifelongNormalizer(
        options.key_dim, options.value_dim, whitening=WhiteningOptions(refresh=options.refresh)
    )
    editor = ModuleEditor(normalizer, step_size=1e-6, ridge=10.0)

    def edit(keys: torch.Tensor, gradients: torch.Tensor) -> None:
        editor.edit(keys, gradients).add_to(weight)

    seconds: list[float] = []
    memory: list[int] = []
    decompositions: list[int] = []
    for turn in range(options.turns):
        keys, gradients = pool[turn % len(pool)]
        seconds.append(timed(device, edit, keys, gradients)[1])
        if turn % 10 == 9 or options.turns < 100:
            memory.append(memory_now(device))
        decompositions.append(normalizer.decompositions)

    means = [1000 * statistics.mean(part) for part in deciles(seconds)]
    medians = [1000 * statistics.median(part) for part in deciles(seconds)]
    resident = [round(statistics.mean(part)) for part in deciles(memory)]
    results = {
        "last_over_second_decile_time": means[-1] / means[1],
        "last_over_second_decile_memory": resident[-1] / resident[1],
        "decompositions": normalizer.decompositions,
        "turns": options.turns,
        "samples": normalizer.count,
        "last_over_second_decile_median_time": medians[-1] / medians[1],
        "ms_per_turn_by_decile": means,
        "median_ms_per_turn_by_decile": medians,
        "memory_bytes_by_decile": resident,
        "decompositions_by_decile": [part[-1] for part in deciles(decompositions)],
    }
    finish("scaling", options, device, results)


def deciles(values: list) -> list[list]:
    """Ten pieces of equal length, up to one."""
    cuts = [len(values) * part // 10 for part in range(11)]
    return [values[low:high] for low, high in pairwise(cuts)]


if __name__ == "__main__":
    main()
