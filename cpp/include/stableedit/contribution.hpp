#pragma once

#include <ATen/core/Tensor.h>

#include "stableedit/export.hpp"
#include "stableedit/low_rank.hpp"

/// \file
/// What some answer tokens of a turn, those of one request say, contributed to its update: the
/// difference to the update that the turn would have had without them. Subtracting it takes a
/// request out of a weight again.
///
/// An update is D^T = X^T Y with X = M^(-1) V and M = Y H^T + c I. Its terms X_i Y_i are no
/// contributions: keys of different requests are nearly parallel, so these terms are large and
/// cancel each other, and taking some away leaves a broken model. Solving the same system without
/// the rows S, with R for the others, differs from it by
///
///     D^T - D_R^T = X_S^T (Y_S - M_SR M_RR^(-1) Y_R)
///
/// which is the term of S with the part of its keys that the others' keys explain taken out. It
/// needs no target and no model, and is computed in float64: M is ill-conditioned, and small.

namespace stableedit {

/// Of an update of `ridge_update` without past keys: Y = H, which is `update.right()`, and c =
/// ridge.
/// \param update of n answer tokens  \param owned `[n]` bool, the tokens S
/// \param ridge that the update was solved with; finite, positive
/// \return an update of rank |S|, in the dtype and on the device of `update`
/// \throws ValueError or TypeError for arguments that do not fit, LinAlgError where the rest of the
///     system is singular.
STABLEEDIT_API LowRankUpdate contribution(const LowRankUpdate& update, const at::Tensor& owned,
                                          double ridge);

/// Of an update of `ridge_update` with past keys: Y = H (weight C + ridge I)^(-1), which is
/// `update.right()`, and c = 1.
/// \param update of n answer tokens  \param owned `[n]` bool, the tokens S
/// \param keys H `[n, k]`, as given to `ridge_update`
/// \return an update of rank |S|, as above  \throws ValueError, TypeError, LinAlgError as above
STABLEEDIT_API LowRankUpdate contribution(const LowRankUpdate& update, const at::Tensor& owned,
                                          const at::Tensor& keys);

}  // namespace stableedit
