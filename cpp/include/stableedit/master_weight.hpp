#pragma once

#include <ATen/core/Tensor.h>

#include "stableedit/export.hpp"
#include "stableedit/low_rank.hpp"

namespace stableedit {

/// The weight of an edited module together with its float32 master.
///
/// A bf16 weight of size 0.02 swallows most of an update of size 1e-5. Updates are therefore added
/// to a float32 master, and the live weight is the master rounded once. A float32 or float64 weight
/// is its own master and costs nothing.
///
/// With `exact_revert`, what each addition rounds away is kept as well (Knuth's TwoSum, one more
/// tensor of the master's size), so that reverting applied updates, in any order, restores the bits
/// the weight would have without them. Master and residual hold 48 bits: entries smaller than about
/// 2^-24 of what was added to them may come back a unit in the last place off (in bfloat16 and
/// float16 not even these).
///
/// Concurrency: const members may be called from several threads; `apply`, `revert` and `restore`
/// need exclusive access, to the live weight as well: a thread that reads it meanwhile may see it
/// between two rows. Two threads may each own the MasterWeight of another weight. A copy of the
/// object shares its tensors and counts as the same; a `clone()` does not.
class STABLEEDIT_API MasterWeight {
 public:
  /// \param live weight of the model, `[v, k]` or as `layout` says, bfloat16, float16, float32 or
  ///     float64; shared, and written in place
  /// \param layout how `live` is laid out
  /// \param exact_revert keep what rounding takes, so that `revert` restores the bits
  explicit MasterWeight(at::Tensor live, WeightLayout layout = WeightLayout::kLinear,
                        bool exact_revert = true);

  /// W <- W + update. \throws as `check`; the weight is then as it was.
  void apply(const LowRankUpdate& update);

  /// W <- W - update.
  /// \throws ValueError for an update of another shape or device, LinAlgError for one that is not
  ///     finite; the weight is then as it was.
  void revert(const LowRankUpdate& update);

  /// \throws ValueError for an update of another shape or device, LinAlgError for one that is not
  ///     finite or that could leave the range of the live dtype. Changes nothing.
  void check(const LowRankUpdate& update) const;

  /// The weight that the model uses; it shares the memory of what was passed in.
  const at::Tensor& live() const { return live_; }

  /// float32 master, or the live weight itself where that is float32 or float64.
  const at::Tensor& master() const { return master_; }

  WeightLayout layout() const { return layout_; }  ///< as constructed

  bool exact_revert() const { return residual_.defined(); }  ///< as constructed

  /// A copy of the state with tensors of its own. (Copying the object shares them.)
  MasterWeight clone() const;

  /// Goes back to a `clone()`, bit for bit. \throws ValueError if it is that of another weight.
  void restore(const MasterWeight& snapshot);

 private:
  void accumulate(const LowRankUpdate& update, double sign);
  void add_exactly(const LowRankUpdate& update, double sign);
  void round_to_live();

  at::Tensor live_;
  at::Tensor master_;
  at::Tensor residual_;  // what rounding took from master_; undefined unless exact_revert
  WeightLayout layout_;
};

}  // namespace stableedit
