#include "stableedit/low_rank.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>

#include <cmath>

#include "checks.hpp"

namespace stableedit {
namespace {

// Whether the matrices themselves cost less than products of the ranks: factors of a turn with more
// rows than the weight has columns.
bool prefers_dense(const LowRankUpdate& one, const LowRankUpdate& other) {
  const double sides = static_cast<double>(one.out_features() + one.in_features());
  const double area =
      static_cast<double>(one.out_features()) * static_cast<double>(one.in_features());
  const double ranks = static_cast<double>(one.rank()) * static_cast<double>(other.rank());
  return ranks * sides > static_cast<double>(one.rank() + other.rank()) * area;
}

}  // namespace

LowRankUpdate::LowRankUpdate(at::Tensor left, at::Tensor right, std::optional<double> norm)
    : left_(std::move(left)), right_(std::move(right)), norm_(norm) {
  check_matrix(left_, "left");
  check_matrix(right_, "right");
  TORCH_CHECK_VALUE(left_.size(1) == right_.size(0),
                    "left must be [v, r] and right [r, k] with one r, but their shapes are ",
                    left_.sizes(), " and ", right_.sizes());
  TORCH_CHECK_TYPE(left_.scalar_type() == right_.scalar_type(), "left is ", left_.scalar_type(),
                   " but right is ", right_.scalar_type(), "; they must have one dtype");
  TORCH_CHECK_VALUE(left_.device() == right_.device(), "left is on ", left_.device(),
                    " but right is on ", right_.device(), "; they must be on one device");
}

at::Tensor LowRankUpdate::dense() const { return at::mm(left_, right_); }

void LowRankUpdate::check_fits(const at::Tensor& weight, WeightLayout layout) const {
  check_matrix(weight, "weight");
  const bool linear = layout == WeightLayout::kLinear;
  const int64_t rows = linear ? out_features() : in_features();
  const int64_t columns = linear ? in_features() : out_features();
  TORCH_CHECK_VALUE(weight.size(0) == rows && weight.size(1) == columns, "weight must have shape [",
                    rows, ", ", columns, "] to take this update, but its shape is ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.device() == left_.device(), "weight is on ", weight.device(),
                    " but the update is on ", left_.device());
}

void LowRankUpdate::accumulate(const at::Tensor& weight, WeightLayout layout, double sign) const {
  check_fits(weight, layout);
  const at::NoGradGuard no_grad;
  const at::ScalarType dtype = compute_dtype(weight);
  const at::Tensor left = left_.to(dtype);
  const at::Tensor right = right_.to(dtype);
  const bool linear = layout == WeightLayout::kLinear;
  const at::Tensor first = linear ? left : right.t();
  const at::Tensor second = linear ? right : left.t();
  if (weight.scalar_type() == dtype) {
    weight.addmm_(first, second, 1.0, sign);
  } else {
    weight.copy_(weight.to(dtype).addmm_(first, second, 1.0, sign));
  }
}

void LowRankUpdate::add_to(const at::Tensor& weight, WeightLayout layout) const {
  accumulate(weight, layout, 1.0);
}

void LowRankUpdate::subtract_from(const at::Tensor& weight, WeightLayout layout) const {
  accumulate(weight, layout, -1.0);
}

double LowRankUpdate::norm() const {
  if (norm_) return *norm_;
  if (!prefers_dense(*this, *this)) return std::sqrt(std::max(0.0, inner(*this)));
  const at::Tensor whole = dense().to(at::kDouble);
  return std::sqrt(whole.mul(whole).sum().item<double>());
}

double LowRankUpdate::inner(const LowRankUpdate& other) const {
  TORCH_CHECK_VALUE(other.out_features() == out_features() && other.in_features() == in_features(),
                    "the inner product needs two updates of one shape, but they are [",
                    out_features(), ", ", in_features(), "] and [", other.out_features(), ", ",
                    other.in_features(), "]");
  TORCH_CHECK_TYPE(other.left_.scalar_type() == left_.scalar_type(),
                   "the inner product needs two updates of one dtype, but they are ",
                   left_.scalar_type(), " and ", other.left_.scalar_type());
  if (prefers_dense(*this, other)) {
    return dense().to(at::kDouble).mul_(other.dense()).sum().item<double>();
  }
  // <L1 R1, L2 R2> = sum((L1^T L2) * (R1 R2^T))
  const at::Tensor lefts = at::mm(left_.t(), other.left_).to(at::kDouble);
  const at::Tensor rights = at::mm(right_, other.right_.t()).to(at::kDouble);
  return lefts.mul_(rights).sum().item<double>();
}

LowRankUpdate LowRankUpdate::scaled(double factor) const {
  TORCH_CHECK_VALUE(std::isfinite(factor), "factor must be finite, but it is ", factor);
  const std::optional<double> norm =
      norm_ ? std::optional<double>(*norm_ * std::abs(factor)) : std::nullopt;
  return {left_.mul(factor), right_, norm};
}

LowRankUpdate LowRankUpdate::select(const at::Tensor& rows) const {
  TORCH_CHECK_VALUE(rows.dim() == 1, "rows must be a vector of indices, but its shape is ",
                    rows.sizes());
  TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, "rows must be int64, but it is ",
                   rows.scalar_type());
  return LowRankUpdate(left_.index_select(1, rows), right_.index_select(0, rows));
}

}  // namespace stableedit
