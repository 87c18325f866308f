#include "stableedit/module_editor.hpp"

#include <cmath>

#include "checks.hpp"
#include "stableedit/ridge.hpp"

namespace stableedit {

ModuleEditor::ModuleEditor(int64_t key_dim, int64_t value_dim, NormalizerOptions normalizer,
                           EditOptions options)
    : ModuleEditor(std::make_shared<LifelongNormalizer>(key_dim, value_dim, normalizer), options) {}

ModuleEditor::ModuleEditor(std::shared_ptr<LifelongNormalizer> normalizer, EditOptions options,
                           std::shared_ptr<PastKeys> past_keys)
    : normalizer_(std::move(normalizer)), options_(options), past_keys_(std::move(past_keys)) {
  TORCH_CHECK_VALUE(normalizer_ != nullptr, "normalizer must not be null");
  TORCH_CHECK_VALUE(std::isfinite(options.step_size) && options.step_size > 0.0,
                    "step_size must be finite and positive, but it is ", options.step_size);
  TORCH_CHECK_VALUE(std::isfinite(options.ridge) && options.ridge > 0.0,
                    "ridge must be finite and positive, but it is ", options.ridge);
  const double weight = options.past_key_weight;
  TORCH_CHECK_VALUE(std::isfinite(weight) && weight >= 0.0,
                    "past_key_weight must be finite and at least 0, but it is ", weight);
  const int64_t key_dim = normalizer_->key_dim();
  if (past_keys_ == nullptr && weight > 0.0) past_keys_ = std::make_shared<PastKeys>(key_dim);
  if (past_keys_ != nullptr) {
    TORCH_CHECK_VALUE(past_keys_->dim() == key_dim, "past_keys must have the keys' dimension ",
                      key_dim, ", but theirs is ", past_keys_->dim());
  }
}

LowRankUpdate ModuleEditor::edit(const at::Tensor& keys, const at::Tensor& value_gradients) {
  const LifelongNormalizer before = *normalizer_;
  try {
    normalizer_->observe(keys, value_gradients);
    LowRankUpdate update = compute_update(keys, value_gradients);
    if (past_keys_ != nullptr) past_keys_->update(keys);
    return update;
  } catch (...) {
    *normalizer_ = before;
    throw;
  }
}

at::Tensor ModuleEditor::targets(const at::Tensor& keys, const at::Tensor& value_gradients,
                                 std::optional<WhiteningMode> mode) {
  check_rows(keys, "keys", normalizer_->key_dim());
  check_rows(value_gradients, "value_gradients", normalizer_->value_dim());
  check_same_rows(keys, "keys", value_gradients, "value_gradients");
  const at::Tensor whitened = normalizer_->normalize_value_gradients(value_gradients, mode);
  if (!normalizer_->options().whitening.centred) return whitened.mul(-options_.step_size);
  const at::Tensor scale =
      normalizer_->normalize_keys(keys).square().sum(1, /*keepdim=*/true).mul_(-options_.step_size);
  return whitened.mul(scale);
}

LowRankUpdate ModuleEditor::compute_update(const at::Tensor& keys,
                                           const at::Tensor& value_gradients,
                                           std::optional<WhiteningMode> mode) {
  const at::Tensor v = targets(keys, value_gradients, mode);
  if (past_keys_ == nullptr) return ridge_update(keys, v, options_.ridge);
  return ridge_update(keys, v, options_.ridge, *past_keys_, options_.past_key_weight);
}

}  // namespace stableedit
