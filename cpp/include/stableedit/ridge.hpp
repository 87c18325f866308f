#pragma once

#include <ATen/core/Tensor.h>

#include "stableedit/export.hpp"
#include "stableedit/low_rank.hpp"
#include "stableedit/past_keys.hpp"

/// \file
/// The update of a turn.
///
/// Concurrency: every function here may be called from several threads; those that take a PastKeys
/// need exclusive access to it.

namespace stableedit {

/// Which of the two equal forms of the ridge system is solved.
enum class RidgeForm {
  kAuto,    ///< whichever system is smaller: dual if n <= k, else primal
  kPrimal,  ///< (H^T H + ridge I_k)^(-1) H^T V, a k x k system
  kDual,    ///< H^T (H H^T + ridge I_n)^(-1) V, an n x n system
};

/// Ridge regression D = (H^T H + ridge I)^(-1) H^T V, StableEdit's update before transposing.
///
/// The Gram matrix is formed in the keys' dtype (float32 at least), factorised by Cholesky and
/// solved in float64. Where Cholesky fails, or ridge = 0 leaves a pivot within the Gram matrix's
/// rounding (linearly dependent keys), the fallback is the minimum-norm solution through the
/// symmetric eigendecomposition, dropping eigenvalues below 10 * size * eps(keys' dtype) * largest.
///
/// \param keys `[n, k]`  \param targets `[n, v]`, same device  \param ridge finite, at least 0
/// \param form which system is solved
/// \return D `[k, v]` in the dtype of the keys (float32 at least)
/// \throws ValueError for shapes or devices that do not fit, a ridge out of range, or values that
///     are not finite.
STABLEEDIT_API at::Tensor solve_ridge(const at::Tensor& keys, const at::Tensor& targets,
                                      double ridge, RidgeForm form = RidgeForm::kAuto);

/// The same solution as a change of a `[v, k]` weight, D^T = X^T H with
/// X = (H H^T + ridge I_n)^(-1) V, without ever forming it: left = X^T, right = H, so that every
/// answer token owns a row. With n > 2 k rows X comes from a k x k system, by the push-through
/// identity X = (V - H (H^T H + ridge I_k)^(-1) H^T V) / ridge in float64.
/// \throws ValueError as `solve_ridge`, LinAlgError where the solution is not finite.
STABLEEDIT_API LowRankUpdate ridge_update(const at::Tensor& keys, const at::Tensor& targets,
                                          double ridge);

/// The same with the keys of earlier turns, D = (H^T H + weight C + ridge I)^(-1) H^T V, C their
/// second moment. With A = weight C + ridge I,
///
///     D^T = X^T Y,   Y = H A^(-1),   X = (I_n + Y H^T)^(-1) V
///
/// so that here, too, every answer token owns a row: left = X^T, right = Y, no longer the raw keys.
/// \param keys H `[n, k]`  \param targets V `[n, v]`, same device  \param ridge finite, positive
/// \param past may renew its factorisation  \param weight finite, at least 0; 0 leaves `past` out
/// \throws ValueError as `solve_ridge`, LinAlgError as `PastKeys::solve`.
STABLEEDIT_API LowRankUpdate ridge_update(const at::Tensor& keys, const at::Tensor& targets,
                                          double ridge, PastKeys& past, double weight);

/// D `[k, v]` of it.
STABLEEDIT_API at::Tensor solve_ridge(const at::Tensor& keys, const at::Tensor& targets,
                                      double ridge, PastKeys& past, double weight);

}  // namespace stableedit
