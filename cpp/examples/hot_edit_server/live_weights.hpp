#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <stableedit/patch.hpp>
#include <string>
#include <vector>

#include "model.hpp"

namespace hot_edit {

/// The model that a generation sees from its first to its last token. Never changes.
struct Version {
  int64_t number = 0;  ///< counts the changes since the server started
  std::vector<std::shared_ptr<const stableedit::Patch>> patches;  ///< in the order of addition
  std::vector<at::Tensor> weights;                                ///< in the order of the model's

  /// What `weights` are rounded from: base + patches, summed in float32 (float64 for float64
  /// weights). The same tensors where there is nothing to round.
  std::vector<at::Tensor> sums;
};

/// The weights of a model that is edited while it serves (read, copy, update).
///
/// A change never touches a tensor that anybody may be reading: it makes new tensors for the
/// weights it concerns and shares the others, then exchanges one pointer. Generations that have
/// begun keep their version, which is freed with the last of them.
///
/// The weights depend on the base and on the list of patches only: adding sums onto what is there,
/// removing sums what remains, from the base on, in the same order. So removing all patches gives
/// the exported bits, and a server that starts again has the bits it had.
///
/// Concurrency: `current` from any thread at any time; `with`, `without` and `publish` from one
/// thread at a time.
class LiveWeights {
 public:
  using Pointer = std::shared_ptr<const Version>;

  /// \param model must live longer
  explicit LiveWeights(const Model& model);

  Pointer current() const;

  /// The next version, not yet visible. \throws Refusal
  Pointer with(std::shared_ptr<const stableedit::Patch> patch) const;
  Pointer without(const std::string& id) const;

  /// Makes a version the current one.
  /// \returns for how long readers were locked out
  std::chrono::nanoseconds publish(Pointer next);

  /// The longest that any reader has waited in `current`.
  std::chrono::nanoseconds longest_wait() const { return std::chrono::nanoseconds(longest_wait_); }

 private:
  size_t index_of(const std::string& module) const;
  void check(const stableedit::Patch& patch) const;
  void finish(Version& version, size_t index, at::Tensor sum) const;

  const Model& model_;
  mutable std::mutex mutex_;  // of current_
  Pointer current_;
  mutable std::atomic<int64_t> longest_wait_{0};
};

}  // namespace hot_edit
