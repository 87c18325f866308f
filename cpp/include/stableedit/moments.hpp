#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "stableedit/export.hpp"
#include "stableedit/state_dict.hpp"

namespace stableedit {

/// Running mean and per-dimension second moment of a stream of row vectors.
///
/// Welford/Chan update in float64, whatever the dtype of the batches: folding a stream in pieces,
/// in any order, or merging two trackers gives the moments of the concatenated stream.
///
/// Value semantics: a copy is an O(1) snapshot, because updates replace the state tensors and never
/// write into them. The state lives on the device of the first batch.
/// Concurrency: const members may be called from several threads; updates need exclusive access.
class STABLEEDIT_API RunningMoments {
 public:
  /// \param dim number of dimensions, at least 1.
  /// \param unbiased_batches adds n * (unbiased variance of the batch) to M2 instead of its
  ///     scatter. This is what the published ULTRAEDIT code does; it makes M2 depend on how the
  ///     stream is cut into batches. Off unless that procedure is to be reproduced.
  explicit RunningMoments(int64_t dim, bool unbiased_batches = false);

  /// Folds in a batch `[n, dim]` of any floating dtype; n = 0 changes nothing.
  void update(const at::Tensor& batch);

  /// Folds in everything `other` has seen.
  void merge(const RunningMoments& other);

  int64_t dim() const { return mean_.size(0); }                ///< number of dimensions
  int64_t count() const { return count_; }                     ///< rows folded in so far
  bool unbiased_batches() const { return unbiased_batches_; }  ///< as constructed

  /// Mean, `[dim]` float64 (zeros before the first batch).
  const at::Tensor& mean() const { return mean_; }

  /// Sum of squared deviations from the mean, `[dim]` float64.
  const at::Tensor& m2() const { return m2_; }

  /// M2 / (count - 1), `[dim]` float64; all zeros while count < 2.
  at::Tensor variance() const;

  /// Square root of `variance()`.
  at::Tensor stddev() const;

  /// Square root of M2 / count + mean^2, `[dim]` float64; all zeros before the first batch.
  at::Tensor root_mean_square() const;

  StateDict state_dict() const;  ///< see stableedit::StateDict

  /// The way back. \throws ValueError for a state that is not of this class.
  static RunningMoments from_state_dict(const StateDict& state);

 private:
  void fold(int64_t count, const at::Tensor& mean, const at::Tensor& m2);

  int64_t count_ = 0;
  at::Tensor mean_;
  at::Tensor m2_;
  bool unbiased_batches_;
};

}  // namespace stableedit
