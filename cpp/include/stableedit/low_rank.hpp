#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "stableedit/export.hpp"

namespace stableedit {

/// How a weight is laid out in memory.
enum class WeightLayout {
  kLinear,  ///< `[v, k]`, as torch.nn.Linear
  kConv1D,  ///< `[k, v]`, as transformers' Conv1D (GPT-2)
};

/// A change of a weight in factored form, `left @ right`, of rank at most r.
///
/// Row i of `right` is the key of answer token i and column i of `left` what this token adds for
/// it, so the share of a single request is a selection of rows (`select`).
/// Concurrency: immutable, so any number of threads may share one; a weight that `add_to` and
/// `subtract_from` write needs exclusive access.
class STABLEEDIT_API LowRankUpdate {
 public:
  /// \param left `[v, r]`  \param right `[r, k]`, same floating dtype and device
  /// \param norm its Frobenius norm, where the caller has it anyway
  LowRankUpdate(at::Tensor left, at::Tensor right, std::optional<double> norm = std::nullopt);

  const at::Tensor& left() const { return left_; }        ///< `[v, r]`
  const at::Tensor& right() const { return right_; }      ///< `[r, k]`
  int64_t rank() const { return right_.size(0); }         ///< r, an upper bound on the rank
  int64_t out_features() const { return left_.size(0); }  ///< v
  int64_t in_features() const { return right_.size(1); }  ///< k

  /// The whole matrix `[v, k]`. Only for looking at it; adding does not need it.
  at::Tensor dense() const;

  /// Adds to a weight in place, one product and no temporary of the weight's size for float32 and
  /// float64 weights; a half-precision weight is computed in float32 and rounded once
  /// (`MasterWeight` avoids losing the small part of an update to that rounding).
  /// \throws ValueError as `check_fits`; the weight is then as it was.
  void add_to(const at::Tensor& weight, WeightLayout layout = WeightLayout::kLinear) const;

  /// Subtracts from a weight in place; otherwise as `add_to`.
  void subtract_from(const at::Tensor& weight, WeightLayout layout = WeightLayout::kLinear) const;

  /// Frobenius norm, from r x r products, or from the matrix where that is less work.
  double norm() const;

  /// Frobenius inner product, from products of the two ranks, or from the matrices where that is
  /// less work.
  /// \throws ValueError for an update of another shape, TypeError for one of another dtype.
  double inner(const LowRankUpdate& other) const;

  /// This many times the change. \throws ValueError for a factor that is not finite.
  LowRankUpdate scaled(double factor) const;

  /// The share of the given rows. \param rows `[m]` int64 indices into 0 .. r-1.
  LowRankUpdate select(const at::Tensor& rows) const;

  /// \throws ValueError unless `weight` has this update's shape in `layout` and its device.
  void check_fits(const at::Tensor& weight, WeightLayout layout) const;

 private:
  void accumulate(const at::Tensor& weight, WeightLayout layout, double sign) const;

  at::Tensor left_;
  at::Tensor right_;
  std::optional<double> norm_;
};

}  // namespace stableedit
