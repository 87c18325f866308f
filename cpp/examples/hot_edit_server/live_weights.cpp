#include "live_weights.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/isfinite.h>

#include <algorithm>
#include <utility>

#include "refusal.hpp"

namespace hot_edit {
namespace {

using Clock = std::chrono::steady_clock;

at::ScalarType wide_dtype(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace

LiveWeights::LiveWeights(const Model& model) : model_(model) {
  auto first = std::make_shared<Version>();
  for (const EditableWeight& weight : model.weights()) {
    first->weights.push_back(weight.base);
    first->sums.push_back(weight.base);
  }
  current_ = std::move(first);
}

LiveWeights::Pointer LiveWeights::current() const {
  const auto begin = Clock::now();
  Pointer version;
  {
    const std::lock_guard lock(mutex_);
    version = current_;
  }
  const int64_t waited = std::chrono::nanoseconds(Clock::now() - begin).count();
  int64_t longest = longest_wait_;
  while (waited > longest && !longest_wait_.compare_exchange_weak(longest, waited)) {
  }
  return version;
}

LiveWeights::Pointer LiveWeights::with(std::shared_ptr<const stableedit::Patch> patch) const {
  const at::NoGradGuard no_grad;
  check(*patch);
  auto next = std::make_shared<Version>(*current());
  for (const auto& [module, change] : patch->modules) {
    const size_t index = index_of(module);
    // A copy in the wide dtype, whether or not the sum already has it.
    const at::Tensor sum = next->sums[index].to(wide_dtype(next->sums[index]),
                                                /*non_blocking=*/false, /*copy=*/true);
    change.add_to(sum);
    finish(*next, index, sum);
  }
  ++next->number;
  next->patches.push_back(std::move(patch));
  return next;
}

LiveWeights::Pointer LiveWeights::without(const std::string& id) const {
  const at::NoGradGuard no_grad;
  auto next = std::make_shared<Version>(*current());
  const auto removed = std::find_if(next->patches.begin(), next->patches.end(),
                                    [&](const auto& patch) { return patch->id == id; });
  if (removed == next->patches.end())
    throw Refusal(404, "there is no patch '" + id + "'; GET /patches lists those that are applied");
  // A copy: what it is of leaves the list in the next line.
  // NOLINTNEXTLINE(performance-unnecessary-copy-initialization)
  const std::shared_ptr<const stableedit::Patch> patch = *removed;
  next->patches.erase(removed);

  for (const auto& [module, change] : patch->modules) {
    const size_t index = index_of(module);
    const at::Tensor& base = model_.weights()[index].base;
    at::Tensor sum = base;
    for (const auto& remaining : next->patches) {
      const auto found = remaining->modules.find(module);
      if (found == remaining->modules.end()) continue;
      if (sum.is_same(base)) sum = base.to(wide_dtype(base), false, /*copy=*/true);
      found->second.add_to(sum);
    }
    finish(*next, index, sum);
  }
  ++next->number;
  return next;
}

std::chrono::nanoseconds LiveWeights::publish(Pointer next) {
  Clock::time_point begin, end;
  {
    const std::lock_guard lock(mutex_);
    begin = Clock::now();
    current_.swap(next);
    end = Clock::now();
  }
  return end - begin;  // the old version is freed only now, outside of the lock
}

void LiveWeights::finish(Version& version, size_t index, at::Tensor sum) const {
  const at::Tensor& base = model_.weights()[index].base;
  at::Tensor weight = sum.to(base.scalar_type());
  if (!at::isfinite(weight).all().item<bool>())
    throw Refusal(422, "the weight of " + model_.weights()[index].module +
                           " would not be finite any more; the patch is broken or far too large");
  version.sums[index] = std::move(sum);
  version.weights[index] = std::move(weight);
}

void LiveWeights::check(const stableedit::Patch& patch) const {
  const Pointer version = current();
  for (const auto& applied : version->patches) {
    if (applied->id == patch.id)
      throw Refusal(409, "there is a patch '" + patch.id +
                             "' already; remove it first, or give this one another \"id\"");
  }
  if (!patch.base_digest.empty() && patch.base_digest != model_.digest())
    throw Refusal(422, "the patch was made for another model (" + patch.base_model + ", digest " +
                           patch.base_digest + "), this server has " + model_.name() +
                           " with digest " + model_.digest());
  if (patch.modules.empty()) throw Refusal(422, "the patch changes nothing");
  for (const auto& [module, change] : patch.modules) {
    const EditableWeight& weight = model_.weights()[index_of(module)];
    if (change.layout != weight.layout)
      throw Refusal(422, "the patch takes " + module + " for a module of another layout");
    try {
      change.check_fits(weight.base);
    } catch (const c10::Error& error) {
      throw Refusal(422,
                    "the patch does not fit " + module + ": " + error.what_without_backtrace());
    }
  }
}

size_t LiveWeights::index_of(const std::string& module) const {
  const auto& weights = model_.weights();
  const auto found =
      std::ranges::find_if(weights, [&](const auto& weight) { return weight.module == module; });
  if (found == weights.end())
    throw Refusal(422, "the patch changes " + module +
                           ", which this model was not exported to take patches for (it takes " +
                           weights.front().module + " to " + weights.back().module + ")");
  return found - weights.begin();
}

}  // namespace hot_edit
