"""Alternatives to a full eigendecomposition for the floored inverse root; compared by whitening.py."""

from __future__ import annotations

import torch


def floored_by_sign(sigma: torch.Tensor, floor: float, tolerance: float = 1e-4, limit: int = 60) -> torch.Tensor:
    """max(Sigma, floor I) = (Sigma + floor I + |Sigma - floor I|) / 2 with |A| = A sign(A), from products alone.

    The sign is a Newton-Schulz iteration, X <- X (3 I - X^2) / 2, which takes longer the closer an eigenvalue is to the
    floor. All of what A is lies in the start X = A / |A|, so an earlier sign is no help.
    """
    identity = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
    shifted = sigma - floor * identity
    sign = shifted / _norm_bound(shifted)
    for _ in range(limit):
        square = sign @ sign
        change = float((square - identity).norm()) / len(sigma) ** 0.5
        if change < tolerance:
            break
        sign = torch.addmm(sign, sign, square, beta=1.5, alpha=-0.5)
    absolute = shifted @ sign
    return (sigma + floor * identity + (absolute + absolute.T) / 2) / 2


def inverse_root(
    matrix: torch.Tensor, scale: float | None = None, tolerance: float = 1e-5, limit: int = 60
) -> torch.Tensor:
    """Inverse square root of a positive definite matrix by the coupled Newton-Schulz iteration, from the identity.

    ``scale``: the iteration runs on matrix / scale, whose eigenvalues must be below 3; found if not given."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    scale = scale or _norm_bound(matrix)
    y, z = matrix / scale, identity
    for _ in range(limit):
        step = torch.addmm(identity, z, y, beta=1.5, alpha=-0.5)
        y, z = y @ step, step @ z
        if float((step - identity).norm()) / len(matrix) ** 0.5 < tolerance:
            break
    return (z + z.T) / (2 * scale**0.5)


def inverse_root_from(last: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The same from a root L near the wanted one: L (L matrix L)^(-1/2), symmetrised.

    L matrix L is near the identity, so few iterations are enough, but the symmetric part is the root to first order
    only, because L and the matrix do not quite commute. The iteration that could start from L itself and converge to
    the root, X <- X (3 I - matrix X^2) / 2, is unstable for condition numbers above 9 (Higham, Functions of Matrices).
    """
    near = last @ matrix @ last
    root = last @ inverse_root((near + near.T) / 2, scale=1.0)
    return (root + root.T) / 2


def eigenpairs_by_krylov(sigma: torch.Tensor, start: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenpairs: Rayleigh-Ritz on the block Krylov space [X, Sigma X] of the start vectors."""
    image = sigma @ start
    block = torch.cat([start, image / image.norm(dim=0)], dim=1)[:, : len(sigma)]
    basis = torch.linalg.qr(block)[0]
    values, vectors = torch.linalg.eigh(basis.T @ (sigma @ basis))
    return values[-wanted:], basis @ vectors[:, -wanted:]


def eigenpairs_by_lobpcg(sigma: torch.Tensor, start: torch.Tensor, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest eigenpairs by torch.lobpcg from the start vectors."""
    scale = float(sigma.diagonal().max())  # its tolerance supposes numbers near one
    values, vectors = torch.lobpcg(sigma / scale, X=start.contiguous(), niter=20, tol=1e-5, largest=True)
    return values[:wanted] * scale, vectors[:, :wanted]


def root_of_pairs(values: torch.Tensor, vectors: torch.Tensor, floor: float) -> torch.Tensor:
    """f I + U_r (L_r^(-1/2) - f) U_r^T with f = floor^(-1/2)."""
    base = floor**-0.5
    root = (vectors * (values.clamp(min=floor).rsqrt() - base)) @ vectors.T
    root.diagonal().add_(base)
    return root


def _norm_bound(matrix: torch.Tensor) -> float:
    """At least the spectral norm of a symmetric matrix, and not far above it."""
    return float(torch.minimum(matrix.norm(), matrix.abs().sum(0).max()))
