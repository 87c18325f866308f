#include "stableedit/patch.hpp"

#include <ATen/core/grad_mode.h>

#include "checks.hpp"

namespace stableedit {
namespace {

// A change in factored form, or null.
const LowRankUpdate* low_rank(const WeightChange& change) {
  return std::get_if<LowRankUpdate>(&change.change);
}

void accumulate(const WeightChange& change, const at::Tensor& weight, double sign) {
  change.check_fits(weight);
  if (const LowRankUpdate* update = low_rank(change)) {
    sign > 0.0 ? update->add_to(weight, change.layout)
               : update->subtract_from(weight, change.layout);
    return;
  }
  const at::NoGradGuard no_grad;
  const at::ScalarType dtype = compute_dtype(weight);
  at::Tensor delta = std::get<at::Tensor>(change.change).to(dtype);
  if (change.layout == WeightLayout::kConv1D) delta = delta.t();
  if (weight.scalar_type() == dtype) {
    weight.add_(delta, sign);
  } else {
    weight.copy_(weight.to(dtype).add_(delta, sign));
  }
}

void check_fits(const Patch& patch, const std::map<std::string, at::Tensor>& weights) {
  for (const auto& [name, change] : patch.modules) {
    const auto weight = weights.find(name);
    TORCH_CHECK_VALUE(weight != weights.end(), "the patch changes module '", shown(name),
                      "', which is not among the given weights");
    try {
      change.check_fits(weight->second);
    } catch (const c10::ValueError& error) {
      TORCH_CHECK_VALUE(false, "module '", shown(name), "': ", error.msg());
    }
  }
}

}  // namespace

int64_t WeightChange::out_features() const {
  const LowRankUpdate* update = low_rank(*this);
  return update ? update->out_features() : std::get<at::Tensor>(change).size(0);
}

int64_t WeightChange::in_features() const {
  const LowRankUpdate* update = low_rank(*this);
  return update ? update->in_features() : std::get<at::Tensor>(change).size(1);
}

at::Tensor WeightChange::dense() const {
  const LowRankUpdate* update = low_rank(*this);
  return update ? update->dense() : std::get<at::Tensor>(change);
}

void WeightChange::add_to(const at::Tensor& weight) const { accumulate(*this, weight, 1.0); }

void WeightChange::subtract_from(const at::Tensor& weight) const {
  accumulate(*this, weight, -1.0);
}

void WeightChange::check_fits(const at::Tensor& weight) const {
  if (const LowRankUpdate* update = low_rank(*this)) {
    update->check_fits(weight, layout);
    return;
  }
  const at::Tensor& delta = std::get<at::Tensor>(change);
  check_matrix(delta, "delta");
  check_matrix(weight, "weight");
  const at::Tensor expected = layout == WeightLayout::kLinear ? delta : delta.t();
  TORCH_CHECK_VALUE(weight.sizes() == expected.sizes(), "weight must have shape ", expected.sizes(),
                    " to take this change, but its shape is ", weight.sizes());
  TORCH_CHECK_VALUE(weight.device() == delta.device(), "weight is on ", weight.device(),
                    " but the change is on ", delta.device());
}

WeightChange WeightChange::to(at::Device device) const {
  if (const LowRankUpdate* update = low_rank(*this)) {
    return {LowRankUpdate(update->left().to(device), update->right().to(device)), layout};
  }
  return {std::get<at::Tensor>(change).to(device), layout};
}

void Patch::add_to(const std::map<std::string, at::Tensor>& weights) const {
  check_fits(*this, weights);
  for (const auto& [name, change] : modules) change.add_to(weights.at(name));
}

void Patch::subtract_from(const std::map<std::string, at::Tensor>& weights) const {
  check_fits(*this, weights);
  for (const auto& [name, change] : modules) change.subtract_from(weights.at(name));
}

}  // namespace stableedit
