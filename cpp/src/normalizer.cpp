#include "stableedit/normalizer.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <random>

#include "checks.hpp"

namespace stableedit {
namespace {

// `[p, v]` of 1 and -1, always the same ones: for any matrix A, the mean square of A z over such z
// is the sum of its squares, A's energy (Hutchinson's estimate of a trace). A single row of A is
// off by sqrt(2 / p), 18 %, and many rows by less.
at::Tensor signs(int64_t dim) {
  constexpr int64_t kProbes = 64;
  at::Tensor result = at::empty({kProbes, dim}, at::kFloat);
  // The standard says which numbers it gives, and they are to be always the same ones.
  std::mt19937_64 bits;  // NOLINT(bugprone-random-generator-seed)
  float* const values = result.mutable_data_ptr<float>();
  for (int64_t i = 0; i < result.numel(); ++i) values[i] = (bits() & 1U) != 0 ? 1.0F : -1.0F;
  return result;
}

}  // namespace

LifelongNormalizer::LifelongNormalizer(int64_t key_dim, int64_t value_dim,
                                       NormalizerOptions options)
    : options_(options),
      key_moments_(key_dim, options.unbiased_batches),
      value_moments_(value_dim, options.unbiased_batches) {
  options.whitening.check();
  if (options.whitening.mode == WhiteningMode::kFull) {
    TORCH_CHECK_VALUE(!options.unbiased_batches,
                      "unbiased_batches belongs to diagonal whitening; full whitening needs the "
                      "exact scatter");
    value_tracker_.emplace(value_dim, options.prior);
  }
}

void LifelongNormalizer::observe(const at::Tensor& keys, const at::Tensor& value_gradients) {
  observe(std::vector<at::Tensor>{keys}, std::vector<at::Tensor>{value_gradients});
}

void LifelongNormalizer::observe(const std::vector<at::Tensor>& keys,
                                 const std::vector<at::Tensor>& value_gradients) {
  TORCH_CHECK_VALUE(keys.size() == value_gradients.size(), "there are ", keys.size(),
                    " batches of keys but ", value_gradients.size(), " of value gradients");
  if (keys.empty()) return;
  // Everything is checked before the first statistic moves.
  for (size_t i = 0; i < keys.size(); ++i) {
    check_rows(keys[i], "keys", key_dim());
    check_rows(value_gradients[i], "value_gradients", value_dim());
    check_same_rows(keys[i], "keys", value_gradients[i], "value_gradients");
    check_finite(keys[i], "keys");
    check_finite(value_gradients[i], "value_gradients");
  }
  LifelongNormalizer next = *this;
  for (const at::Tensor& batch : keys) next.key_moments_.update(batch);
  for (const at::Tensor& batch : value_gradients) next.value_moments_.update(batch);
  if (next.value_tracker_) {
    next.value_tracker_->update(value_gradients);
    if (next.outgrown(value_gradients)) next.whitener_.reset();
  }
  *this = std::move(next);
}

void LifelongNormalizer::merge(const LifelongNormalizer& other) {
  TORCH_CHECK_VALUE(other.options_.whitening.mode == options_.whitening.mode,
                    "cannot merge a normalizer with ", to_string(other.options_.whitening.mode),
                    " whitening into one with ", to_string(options_.whitening.mode), " whitening");
  TORCH_CHECK_VALUE(other.options_.whitening.centred == options_.whitening.centred,
                    "cannot merge a centred normalizer and one that is not");
  LifelongNormalizer next = *this;
  next.key_moments_.merge(other.key_moments_);
  next.value_moments_.merge(other.value_moments_);
  if (next.value_tracker_) next.value_tracker_->merge(*other.value_tracker_);
  next.whitener_.reset();
  *this = std::move(next);
}

at::Tensor LifelongNormalizer::normalize_keys(const at::Tensor& keys) const {
  check_rows(keys, "keys", key_dim());
  const at::ScalarType dtype = compute_dtype(keys);
  if (options_.whitening.mode == WhiteningMode::kNone) return keys.to(dtype);
  return Whitener::diagonal(key_moments_.stddev())
      .transform(keys.to(dtype) - key_moments_.mean().to(dtype));
}

WhiteningMode LifelongNormalizer::effective_mode(std::optional<WhiteningMode> mode) const {
  const WhiteningMode configured = options_.whitening.mode;
  WhiteningMode effective = mode.value_or(configured);
  TORCH_CHECK_VALUE(effective <= configured, "a normalizer with ", to_string(configured),
                    " whitening cannot do ", to_string(effective), " whitening");
  const bool too_early = effective == WhiteningMode::kFull && !value_tracker_->has_covariance();
  return too_early ? WhiteningMode::kDiagonal : effective;
}

at::Tensor LifelongNormalizer::normalize_value_gradients(const at::Tensor& value_gradients,
                                                         std::optional<WhiteningMode> mode) {
  check_rows(value_gradients, "value_gradients", value_dim());
  const at::ScalarType dtype = compute_dtype(value_gradients);
  at::Tensor rows = value_gradients.to(dtype);
  const WhiteningMode effective = effective_mode(mode);
  if (effective == WhiteningMode::kNone) return rows;
  const bool centred = options_.whitening.centred;
  if (effective == WhiteningMode::kDiagonal) {
    if (!centred) return Whitener::diagonal(value_moments_.root_mean_square()).transform(rows);
    return Whitener::diagonal(value_moments_.stddev())
        .transform(rows - value_moments_.mean().to(dtype));
  }
  const double nu = value_tracker_->nu();
  const bool due = !whitener_ || whitener_dtype_ != dtype || nu < whitener_nu_ ||
                   (nu > whitener_nu_ && nu >= whitener_nu_ * (1.0 + options_.whitening.refresh));
  if (due) {
    whitener_dtype_ = dtype;
    whitener_nu_ = nu;
    keep(Whitener::full(centred ? value_tracker_->covariance_upper(dtype)
                                : value_tracker_->second_moment_upper(dtype),
                        options_.whitening.floor, options_.whitening.floor_mode,
                        options_.whitening.refresh > 0.0));
    ++decompositions_;
  }
  return whitener_->transform(centred ? rows - value_tracker_->mean().to(dtype) : rows);
}

void LifelongNormalizer::keep(Whitener whitener) {
  whitener_ = std::move(whitener);
  if (options_.whitening.refresh == 0.0) return;
  const double scale = 1.0 / std::sqrt(static_cast<double>(value_dim()));
  const at::Device device = value_tracker_->mean().device();
  probes_ = whitener_->transform(signs(value_dim()).to(device, whitener_dtype_) * scale);
}

// Whether the kept whitener makes more of this turn than its covariance lets expect. Whitening all
// rows to find out would cost a product with the root, n v^2; their products with the whitened
// probes are n v p, and miss none of the rows.
bool LifelongNormalizer::outgrown(const std::vector<at::Tensor>& value_gradients) const {
  if (!whitener_ || options_.whitening.refresh == 0.0) return false;
  const at::Tensor directions = probes_.t();
  at::Tensor mean = at::mv(probes_, value_tracker_->mean().to(whitener_dtype_));
  if (!options_.whitening.centred) mean = at::zeros_like(mean);
  at::Tensor squares = at::zeros({}, mean.options().dtype(at::kDouble));
  int64_t n = 0;
  for (const at::Tensor& batch : value_gradients) {
    const at::Tensor rows = batch.detach().to(whitener_dtype_);
    squares += at::addmm(mean, rows, directions, -1.0).square_().sum(at::kDouble);
    n += batch.size(0);
  }
  const double expected = whitener_->mean_square() * static_cast<double>(n * probes_.size(0));
  return !(squares.item<double>() <= options_.whitening.drift_limit * expected);
}

}  // namespace stableedit
