#include "stableedit/moments.hpp"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "checks.hpp"

namespace stableedit {
namespace {

constexpr int64_t kBlock = 64;  // rows of a batch handled at once

}  // namespace

RunningMoments::RunningMoments(int64_t dim, bool unbiased_batches)
    : unbiased_batches_(unbiased_batches) {
  TORCH_CHECK_VALUE(dim > 0, "dim must be at least 1, but it is ", dim);
  mean_ = at::zeros({dim}, at::kDouble);
  m2_ = at::zeros({dim}, at::kDouble);
}

void RunningMoments::update(const at::Tensor& batch) {
  check_rows(batch, "batch", dim());
  const int64_t n = batch.size(0);
  if (n == 0) return;
  // In blocks, so that the float64 copies stay small.
  RunningMoments total(dim());
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    at::Tensor rows = batch.detach().slice(0, begin, end).to(at::kDouble, false, /*copy=*/true);
    const at::Tensor mean = rows.mean(0);
    total.fold(end - begin, mean, rows.sub_(mean).square_().sum(0));
  }
  check_finite(total.mean_, "batch");  // NaN or infinity anywhere in a column shows in its mean
  // The published code multiplies the unbiased variance by n. Its NaN for a single row is not kept.
  const double rows = static_cast<double>(n);
  fold(n, total.mean_, unbiased_batches_ && n > 1 ? total.m2_ * (rows / (rows - 1.0)) : total.m2_);
}

void RunningMoments::merge(const RunningMoments& other) {
  TORCH_CHECK_VALUE(other.dim() == dim(), "cannot merge moments of dimension ", other.dim(),
                    " into moments of dimension ", dim());
  TORCH_CHECK_VALUE(other.unbiased_batches_ == unbiased_batches_,
                    "cannot merge moments with unbiased_batches = ", other.unbiased_batches_,
                    " into moments with unbiased_batches = ", unbiased_batches_);
  if (other.count_ > 0) fold(other.count_, other.mean_, other.m2_);
}

void RunningMoments::fold(int64_t count, const at::Tensor& mean, const at::Tensor& m2) {
  if (count_ == 0) {
    count_ = count;
    mean_ = mean.clone();
    m2_ = m2.clone();
    return;
  }
  TORCH_CHECK_VALUE(mean.device() == mean_.device(), "the statistics are on ", mean_.device(),
                    ", but what is to be folded in is on ", mean.device());
  const double share = static_cast<double>(count) / static_cast<double>(count_ + count);
  const at::Tensor delta = mean - mean_;
  mean_ = mean_ + delta * share;
  m2_ = m2_ + m2 + delta.square() * (static_cast<double>(count_) * share);
  count_ += count;
}

at::Tensor RunningMoments::variance() const {
  if (count_ < 2) return at::zeros_like(m2_);
  return m2_ / static_cast<double>(count_ - 1);
}

at::Tensor RunningMoments::root_mean_square() const {
  return (m2_ / std::max(1.0, static_cast<double>(count_)) + mean_.square()).sqrt();
}

at::Tensor RunningMoments::stddev() const { return variance().sqrt_(); }

}  // namespace stableedit
