#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <utility>

#include "stableedit/low_rank.hpp"
#include "stableedit/whitening.hpp"

namespace stableedit::bindings {

namespace py = pybind11;

void bind_null_space(py::module_& m);
void bind_past_keys(py::module_& m);
void bind_statistics(py::module_& m);
void bind_step(py::module_& m);
void bind_update(py::module_& m);
void bind_serialization(py::module_& m);

/// Releases the GIL around `function` and turns c10 errors into ValueError, TypeError, LinAlgError.
template <typename Function>
auto no_gil(Function&& function) {
  return torch::wrap_pybind_function_no_gil(std::forward<Function>(function));
}

/// 'linear' or 'conv1d'.
WeightLayout weight_layout(const std::string& name);

/// None, or a mode by its name.
inline std::optional<WhiteningMode> optional_mode(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return whitening_mode(*name);
}

}  // namespace stableedit::bindings
