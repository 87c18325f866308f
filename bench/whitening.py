"""Ways to the floored inverse root of a covariance: what each costs and how exact it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from common import finish, milliseconds, new_parser, start, timed
from roots import (
    eigenpairs_by_krylov,
    eigenpairs_by_lobpcg,
    floored_by_sign,
    inverse_root,
    inverse_root_from,
    root_of_pairs,
)
from synthetic import SPECTRA, Source

_METHODS = ("eigh", "newton_schulz_cold", "newton_schulz_warm", "block_krylov_warm", "lobpcg_warm", "reuse")


def main() -> None:
    parser = new_parser(
        "Compares full eigh, Newton-Schulz (matrix products only: sign iteration for the floor, then the inverse "
        "root, cold or from the last root), the eigenpairs\nabove the floor (block Krylov and LOBPCG from the last "
        "ones) and reuse of the last root, after the statistics have grown by --growth.\n"
        "Error: relative, Frobenius, of the root against float64 eigh.",
        "whitening.py --dim 4096 --json bench/results/whitening.json",
    )
    parser.add_argument("--dim", type=int, default=576, metavar="V", help="dimension v (default 576)")
    parser.add_argument("--nu", type=int, metavar="N", help="samples in the first covariance (default 16 v)")
    parser.add_argument(
        "--growth", type=float, default=0.1, metavar="X", help="of nu since the last root (default 0.1)"
    )
    parser.add_argument("--floor", type=float, default=0.1, metavar="X", help="relative to the mean (default 0.1)")
    parser.add_argument("--spectra", nargs="+", choices=list(SPECTRA), default=list(SPECTRA))
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS))
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, median (default 3)")
    options = parser.parse_args()
    device = start(options)
    results: dict[str, object] = {}
    for spectrum in options.spectra:
        old, new = covariances(spectrum, options.dim, options.nu or 16 * options.dim, options.growth, device)
        results[spectrum] = compare(old, new, options.floor, options.methods, options.repeats, device)
    times = {name: found["methods"]["eigh"] for name, found in results.items() if "eigh" in found["methods"]}
    results = {
        "fastest": {
            spectrum: min(
                (name for name, method in found["methods"].items() if method.get("error", 1) < 1e-3),
                key=lambda name, found=found: found["methods"][name]["median_ms"],
                default=None,
            )
            for spectrum, found in results.items()
        },
        "eigh_ms": {name: method["median_ms"] for name, method in times.items()},
        **results,
    }
    finish("whitening", options, device, results)


def covariances(
    spectrum: str, dim: int, nu: int, growth: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample covariances, float32, of nu rows and of nu (1 + growth) rows of one stream."""
    source = Source(1, dim, device, spectrum)

    def scatter(rows: int) -> torch.Tensor:
        total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        for begin in range(0, rows, 4096):
            batch = source.gradients(min(4096, rows - begin))
            total += batch.T @ batch
        return total

    more = max(int(growth * nu), 1)
    first = scatter(nu)
    second = first + scatter(more)
    return (first / nu).float(), (second / (nu + more)).float()


def compare(
    old: torch.Tensor, new: torch.Tensor, floor: float, methods: list[str], repeats: int, device: torch.device
) -> dict[str, object]:
    dim = len(new)
    exact_values, exact_vectors = torch.linalg.eigh(new.double())
    absolute = floor * float(exact_values.mean())
    exact = (exact_vectors * exact_values.clamp(min=absolute).rsqrt()) @ exact_vectors.T
    kept = int((exact_values > absolute).sum())

    old_values, old_vectors = torch.linalg.eigh(old)
    old_floor = floor * float(old_values.mean())
    last_root = (old_vectors * old_values.clamp(min=old_floor).rsqrt()) @ old_vectors.T
    spare = max(8, kept // 50)  # a few more vectors than eigenpairs are wanted
    last_vectors = old_vectors[:, max(dim - kept - spare, 0) :]

    def eigh() -> torch.Tensor:
        values, vectors = torch.linalg.eigh(new)
        return (vectors * values.clamp(min=absolute).rsqrt()) @ vectors.T

    def partial(eigenpairs: Callable) -> Callable[[], torch.Tensor]:
        return lambda: root_of_pairs(*eigenpairs(new, last_vectors, kept), absolute)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "eigh": eigh,
        "newton_schulz_cold": lambda: inverse_root(floored_by_sign(new, absolute)),
        "newton_schulz_warm": lambda: inverse_root_from(last_root, floored_by_sign(new, absolute)),
        "block_krylov_warm": partial(eigenpairs_by_krylov),
        "lobpcg_warm": partial(eigenpairs_by_lobpcg),
        "reuse": lambda: last_root,
    }
    found = {}
    for name in methods:
        if name == "lobpcg_warm" and 3 * last_vectors.shape[1] > dim:
            found[name] = {
                "skipped": f"torch.lobpcg finds at most v / 3 eigenpairs; {kept} of {dim} are above the floor"
            }
            continue
        seconds = []
        for _ in range(repeats):
            root, taken = timed(device, ways[name])
            seconds.append(taken)
        error = float((root.double() - exact).norm() / exact.norm())
        found[name] = {"error": error, **milliseconds(seconds)}
    product = [timed(device, torch.mm, new, new)[1] for _ in range(repeats)]
    return {
        "above_floor": kept,
        "dim": dim,
        "condition_after_floor": float(exact_values.max()) / absolute,
        "one_product_ms": milliseconds(product)["median_ms"],
        "methods": found,
    }


if __name__ == "__main__":
    main()
