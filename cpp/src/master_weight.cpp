#include "stableedit/master_weight.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "checks.hpp"

namespace stableedit {
namespace {

// Rows handled at once by the compensated addition; its temporaries then stay in the cache.
constexpr int64_t kBlock = 256;

// The largest finite value of a weight's dtype.
double largest_value(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 65504.0;
    case at::kBFloat16:
      return 0x1.fep127;
    case at::kFloat:
      return std::numeric_limits<float>::max();
    default:
      return std::numeric_limits<double>::max();
  }
}

// No entry of the update is larger: |(left right)_ij| <= ||left_i|| ||right_j||. The sums under
// these norms also find NaN and infinity.
double largest_entry(const LowRankUpdate& update) {
  if (update.rank() == 0) return 0.0;
  const at::Tensor rows = update.left().norm(2, {1}, false, at::kDouble);
  const at::Tensor columns = update.right().norm(2, {0}, false, at::kDouble);
  const double bound = (rows.max() * columns.max()).item<double>();
  TORCH_CHECK_LINALG(std::isfinite(bound), "the update contains NaN or infinite values");
  return bound;
}

}  // namespace

MasterWeight::MasterWeight(at::Tensor live, WeightLayout layout, bool exact_revert)
    : live_(std::move(live)), layout_(layout) {
  check_matrix(live_, "live");
  const at::ScalarType dtype = live_.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
      "live must be float32, float64, float16 or bfloat16, but it is ", dtype);
  live_ = live_.detach();  // shares the memory, not the autograd history
  master_ = dtype == compute_dtype(live_) ? live_ : live_.to(at::kFloat);
  if (exact_revert) residual_ = at::zeros_like(master_);
}

void MasterWeight::apply(const LowRankUpdate& update) {
  check(update);
  accumulate(update, 1.0);
}

void MasterWeight::revert(const LowRankUpdate& update) {
  // Not `check`: its bound may refuse to take back what it allowed to be added.
  update.check_fits(master_, layout_);
  largest_entry(update);
  accumulate(update, -1.0);
}

void MasterWeight::check(const LowRankUpdate& update) const {
  update.check_fits(master_, layout_);
  const double bound = largest_entry(update);
  if (bound == 0.0) return;
  const at::ScalarType dtype = live_.scalar_type();
  // Only float16 is so narrow that the weight itself matters; elsewhere half of the range is left
  // to it, which saves a pass over the weight.
  const double largest =
      dtype == at::kHalf ? master_.abs().max().item<double>() + bound : 2.0 * bound;
  TORCH_CHECK_LINALG(largest <= largest_value(dtype), "the edited weight could reach ", largest,
                     ", beyond what ", dtype, " holds (", largest_value(dtype),
                     "); use a smaller step_size");
}

void MasterWeight::accumulate(const LowRankUpdate& update, double sign) {
  if (update.rank() == 0) return;
  const at::NoGradGuard no_grad;
  if (residual_.defined()) {
    add_exactly(update, sign);
  } else if (sign > 0.0) {
    update.add_to(master_, layout_);
  } else {
    update.subtract_from(master_, layout_);
  }
  round_to_live();
}

// Adds in pieces of rows with Knuth's TwoSum: sum + error = master + change holds exactly, and the
// error is carried in residual_. The same update always gives the same change, so a revert takes
// back exactly what was added.
void MasterWeight::add_exactly(const LowRankUpdate& update, double sign) {
  const at::ScalarType dtype = master_.scalar_type();
  const bool linear = layout_ == WeightLayout::kLinear;
  const at::Tensor first = (linear ? update.left() : update.right().t()).to(dtype);
  const at::Tensor second = (linear ? update.right() : update.left().t()).to(dtype);
  const int64_t rows = master_.size(0);
  for (int64_t begin = 0; begin < rows; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, rows);
    const at::Tensor change = at::mm(first.slice(0, begin, end), second).mul_(sign);
    const at::Tensor master = master_.slice(0, begin, end);
    const at::Tensor residual = residual_.slice(0, begin, end);
    const at::Tensor sum = master + change;
    const at::Tensor part = sum - master;
    const at::Tensor error = (master - (sum - part)).add_(change - part);
    residual.add_(error);
    const at::Tensor renormalised = sum + residual;
    residual.sub_(renormalised - sum);
    master.copy_(renormalised);
  }
}

void MasterWeight::round_to_live() {
  if (!live_.is_same(master_)) live_.copy_(master_);
}

MasterWeight MasterWeight::clone() const {
  MasterWeight copy = *this;
  copy.live_ = live_.clone();
  copy.master_ = live_.is_same(master_) ? copy.live_ : master_.clone();
  if (residual_.defined()) copy.residual_ = residual_.clone();
  return copy;
}

void MasterWeight::restore(const MasterWeight& snapshot) {
  TORCH_CHECK_VALUE(snapshot.live_.sizes() == live_.sizes() &&
                        snapshot.live_.scalar_type() == live_.scalar_type() &&
                        snapshot.exact_revert() == exact_revert(),
                    "the snapshot belongs to another weight");
  const at::NoGradGuard no_grad;
  live_.copy_(snapshot.live_);
  if (!live_.is_same(master_)) master_.copy_(snapshot.master_);
  if (residual_.defined()) residual_.copy_(snapshot.residual_);
}

}  // namespace stableedit
