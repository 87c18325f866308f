#include "stableedit/normalizer.hpp"

#include <ATen/ops/cat.h>

#include "checks.hpp"

namespace stableedit {
namespace {

// Rows of a batch from which drift is measured: enough for an average, few enough to cost nothing.
constexpr int64_t kSample = 64;

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
    if (options_.whitening.refresh > 0.0) next.sample(value_gradients);
  }
  *this = std::move(next);
}

void LifelongNormalizer::merge(const LifelongNormalizer& other) {
  TORCH_CHECK_VALUE(other.options_.whitening.mode == options_.whitening.mode,
                    "cannot merge a normalizer with ", to_string(other.options_.whitening.mode),
                    " whitening into one with ", to_string(options_.whitening.mode), " whitening");
  LifelongNormalizer next = *this;
  next.key_moments_.merge(other.key_moments_);
  next.value_moments_.merge(other.value_moments_);
  if (next.value_tracker_) next.value_tracker_->merge(*other.value_tracker_);
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
  if (effective == WhiteningMode::kDiagonal) {
    return Whitener::diagonal(value_moments_.stddev())
        .transform(rows - value_moments_.mean().to(dtype));
  }
  const double nu = value_tracker_->nu();
  const bool due = !whitener_ || whitener_dtype_ != dtype || nu < whitener_nu_ ||
                   (nu > whitener_nu_ && nu >= whitener_nu_ * (1.0 + options_.whitening.refresh));
  if (due) {
    whitener_ = Whitener::full(value_tracker_->covariance_upper(dtype), options_.whitening.floor,
                               options_.whitening.floor_mode, options_.whitening.refresh > 0.0);
    ++decompositions_;
    whitener_nu_ = nu;
    whitener_dtype_ = dtype;
    whitener_energy_ = sample_energy();
  }
  return whitener_->transform(rows - value_tracker_->mean().to(dtype));
}

// Keeps evenly spaced rows of a batch and drops the whitener if they say that the gradients are no
// longer those it was computed from.
void LifelongNormalizer::sample(const std::vector<at::Tensor>& value_gradients) {
  int64_t n = 0;
  for (const at::Tensor& batch : value_gradients) n += batch.size(0);
  if (n == 0) return;
  const int64_t step = (n + kSample - 1) / kSample;
  std::vector<at::Tensor> rows;
  for (const at::Tensor& batch : value_gradients) {
    rows.push_back(batch.slice(0, 0, batch.size(0), step).to(compute_dtype(batch)));
  }
  sample_ = at::cat(rows);
  if (!whitener_ || whitener_energy_ <= 0.0) return;
  const double drift = sample_energy() / whitener_energy_;
  if (drift > options_.whitening.drift_limit || drift * options_.whitening.drift_limit < 1.0) {
    whitener_.reset();
  }
}

// Mean square of the whitened sample.
double LifelongNormalizer::sample_energy() const {
  if (!sample_.defined()) return 0.0;
  const at::Tensor centred = sample_ - value_tracker_->mean().to(sample_.scalar_type());
  return whitener_->transform(centred).square_().mean(at::kDouble).item<double>();
}

}  // namespace stableedit
