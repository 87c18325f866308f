#include "stableedit/step.hpp"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "checks.hpp"

namespace stableedit {

double first_order_decrease(const LowRankUpdate& update, const at::Tensor& keys,
                            const at::Tensor& value_gradients) {
  check_rows(keys, "keys", update.in_features());
  check_rows(value_gradients, "value_gradients", update.out_features());
  check_same_rows(keys, "keys", value_gradients, "value_gradients");
  TORCH_CHECK_VALUE(keys.device() == update.left().device(), "keys are on ", keys.device(),
                    " but the update is on ", update.left().device());
  const at::NoGradGuard no_grad;
  const at::ScalarType dtype = update.left().scalar_type();
  // sum_i <g_i, L R h_i> = <G^T H, L R>, the inner product with the gradient of the weight.
  return -LowRankUpdate(value_gradients.to(dtype).t(), keys.to(dtype)).inner(update);
}

PolyakStep::PolyakStep(StepOptions options) : options_(options) {
  TORCH_CHECK_VALUE(std::isfinite(options.share) && options.share > 0.0,
                    "share must be finite and positive, but it is ", options.share);
  TORCH_CHECK_VALUE(std::isfinite(options.growth) && options.growth > 1.0,
                    "growth must be finite and greater than 1, but it is ", options.growth);
  TORCH_CHECK_VALUE(options.window >= 1, "window must be at least 1, but it is ", options.window);
}

double PolyakStep::choose(double loss, double decrease) const {
  TORCH_CHECK_VALUE(std::isfinite(loss) && loss >= 0.0,
                    "loss must be finite and at least 0, but it is ", loss);
  TORCH_CHECK_VALUE(std::isfinite(decrease), "decrease must be finite, but it is ", decrease);
  if (loss == 0.0) return 0.0;
  TORCH_CHECK_VALUE(decrease > 0.0, "the update does not decrease the loss of ", loss,
                    " (to first order it takes ", decrease,
                    " from it): the value gradients vanish at the edited modules, or the update "
                    "does not follow them");
  const double step = options_.share * loss / decrease;
  TORCH_CHECK_VALUE(std::isfinite(step), "the update decreases the loss of ", loss,
                    " by too little for a step: ", decrease);
  if (recent_.empty()) return step;
  std::vector<double> sorted = recent_;
  const auto middle = sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return std::min(step, options_.growth * *middle);
}

void PolyakStep::accept(double step) {
  TORCH_CHECK_VALUE(std::isfinite(step) && step >= 0.0,
                    "step must be finite and at least 0, but it is ", step);
  if (step == 0.0) return;
  if (static_cast<int64_t>(recent_.size()) == options_.window) recent_.erase(recent_.begin());
  recent_.push_back(step);
}

}  // namespace stableedit
