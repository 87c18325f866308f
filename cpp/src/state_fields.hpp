#pragma once

// How the nouns of the library write their fields into a StateDict and take them out again.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>

#include "stableedit/state_dict.hpp"

namespace stableedit {

at::Tensor integer_field(int64_t value);
at::Tensor number_field(double value);

/// Puts a part's state into the whole's, each name behind `prefix`.
void add_part(StateDict& state, const std::string& prefix, const StateDict& part);

/// Takes fields out one by one; what is left at the end is unknown.
class StateReader {
 public:
  /// \param owner what messages call the object, e.g. "LifelongNormalizer"
  StateReader(StateDict state, std::string owner)
      : rest_(std::move(state)), owner_(std::move(owner)) {}

  /// A float32 or float64 tensor of `dims` dimensions, checked to be finite; a contiguous copy.
  at::Tensor tensor(const std::string& name, int64_t dims);

  /// The same, but float64.
  at::Tensor statistic(const std::string& name, int64_t dims);

  int64_t integer(const std::string& name, int64_t least, int64_t most = INT64_MAX);
  double number(const std::string& name);

  /// All fields behind `prefix`, without it.
  StateDict part(const std::string& prefix);

  bool has(const std::string& name) const { return rest_.contains(name); }

  /// \throws ValueError if a field was not taken.
  void finish() const;

 private:
  at::Tensor take(const std::string& name);

  StateDict rest_;
  std::string owner_;
};

}  // namespace stableedit
