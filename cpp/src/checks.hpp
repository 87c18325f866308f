#pragma once

// Argument checks shared by the sources. User errors become ValueError in Python, with a sentence
// that names the argument, what it is and what it should be.

// Tensor operators without the include of every ATen function.
#ifndef AT_PER_OPERATOR_HEADERS
#define AT_PER_OPERATOR_HEADERS
#endif

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>

namespace stableedit {

/// The dtype in which the mathematics of a tensor runs: its own, but never below float32.
inline at::ScalarType compute_dtype(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// Text from a file as a message shows it: on one line, and cut where it is long.
inline std::string shown(std::string_view text) {
  constexpr size_t kMost = 100;  // bytes
  size_t end = std::min(text.size(), kMost);
  if (end < text.size()) {
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0U) == 0x80U)
      --end;  // between two UTF-8 characters
  }
  std::string line(text.substr(0, end));
  for (char& c : line) {
    if (static_cast<unsigned char>(c) < ' ' || c == '\x7f') c = '?';
  }
  return end < text.size() ? line + "..." : line;
}

inline void check_matrix(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(tensor.defined(), name, " is not a tensor; expected a floating-point matrix");
  TORCH_CHECK_VALUE(tensor.dim() == 2, name, " must be a matrix [rows, columns], but its shape is ",
                    tensor.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), name,
                   " must have a floating-point dtype, but it is ", tensor.scalar_type());
}

inline void check_rows(const at::Tensor& tensor, const char* name, int64_t columns) {
  check_matrix(tensor, name);
  TORCH_CHECK_VALUE(tensor.size(1) == columns, name, " must have shape [n, ", columns,
                    "], but its shape is ", tensor.sizes());
}

inline void check_same_rows(const at::Tensor& a, const char* a_name, const at::Tensor& b,
                            const char* b_name) {
  TORCH_CHECK_VALUE(a.size(0) == b.size(0), a_name, " and ", b_name,
                    " must have one row per answer token each, but their shapes are ", a.sizes(),
                    " and ", b.sizes());
  TORCH_CHECK_VALUE(a.device() == b.device(), a_name, " is on ", a.device(), " but ", b_name,
                    " is on ", b.device(), "; they must be on one device");
}

inline void check_finite(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_VALUE(at::isfinite(tensor).all().item<bool>(), name,
                    " contains NaN or infinite values; nothing was changed");
}

}  // namespace stableedit
