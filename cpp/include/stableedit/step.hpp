#pragma once

#include <cstdint>
#include <vector>

#include "stableedit/export.hpp"
#include "stableedit/low_rank.hpp"
#include "stableedit/state_dict.hpp"

/// \file
/// The step that a turn asks for, instead of a step size (Polyak's rule).
///
/// An update is linear in its step size. Solve with step size 1 for U, and take `alpha U` with
///
///     alpha = share * L / s,      s = - sum over modules and rows i of <g_i, U h_i>,
///
/// L the loss whose gradients g_i were captured at keys h_i, so that s is the decrease of L that U
/// promises to first order. Rescaling the loss, the gradients or the weights (with what follows
/// them) changes alpha and U such that the edited function stays what it was. B. T. Polyak,
/// "Introduction to Optimization" (1987), section 5.3, with 0 for the least loss.

namespace stableedit {

/// The first-order decrease `- sum_i <g_i, U h_i>` of a loss by an update, from products of its
/// rank only: in the dtype of the update, summed in float64. Where the rows of a turn lie on
/// several devices or ranks, the decreases of the parts add up to that of the whole.
///
/// \param update U `[v, k]`  \param keys h `[n, k]`  \param value_gradients g `[n, v]`, same device
/// \return positive where the loss falls
/// \throws ValueError for shapes or devices that do not fit.
STABLEEDIT_API double first_order_decrease(const LowRankUpdate& update, const at::Tensor& keys,
                                           const at::Tensor& value_gradients);

/// How far Polyak's rule is followed.
struct STABLEEDIT_API StepOptions {
  double share = 1.0;   ///< of the loss that the update shall remove to first order, positive
  double growth = 3.0;  ///< a step is at most so many times the median of the recent ones, above 1
  int64_t window = 9;   ///< how many steps are recent, at least 1
};

/// Chooses the steps of a stream, and remembers the recent ones for the trust region.
///
/// The result depends on the loss, the decrease and the remembered steps only: ranks that hold the
/// same three choose the same step, bit for bit, so a data-parallel caller reduces loss and
/// decrease to one value for all ranks first (an all-reduce gives all ranks the same bits).
/// Value semantics. Concurrency: const members may be called from several threads; `accept` needs
/// exclusive access.
class STABLEEDIT_API PolyakStep {
 public:
  /// \throws ValueError for an option out of range.
  explicit PolyakStep(StepOptions options = {});

  /// alpha for an update of step size 1. Changes nothing: `accept` the step that was taken.
  /// \param loss finite, at least 0; 0 asks for no step at all  \param decrease finite
  /// \return at least 0
  /// \throws ValueError where the loss is positive but the update does not decrease it (decrease is
  ///     0 or less): the gradient vanishes at the edited modules, or the update does not follow it.
  double choose(double loss, double decrease) const;

  /// Remembers a step that was applied, in steps of `choose`; steps of 0 are not remembered.
  /// \throws ValueError for a step that is negative or not finite.
  void accept(double step);

  const StepOptions& options() const { return options_; }        ///< as constructed
  const std::vector<double>& recent() const { return recent_; }  ///< oldest first

  /// Fields: "share", "growth", "window", "recent" [at most window], all float64 but the window.
  StateDict state_dict() const;

  /// The way back. \throws ValueError for a state that is not of this class.
  static PolyakStep from_state_dict(const StateDict& state);

 private:
  StepOptions options_;
  std::vector<double> recent_;
};

}  // namespace stableedit
