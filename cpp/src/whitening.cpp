#include "stableedit/whitening.hpp"

#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>

#include <cmath>
#include <limits>

#include "checks.hpp"

namespace stableedit {

WhiteningMode whitening_mode(const std::string& name) {
  if (name == "none") return WhiteningMode::kNone;
  if (name == "diagonal") return WhiteningMode::kDiagonal;
  if (name == "full") return WhiteningMode::kFull;
  TORCH_CHECK_VALUE(false, "whitening must be 'none', 'diagonal' or 'full', not '", name, "'");
}

std::string to_string(WhiteningMode mode) {
  switch (mode) {
    case WhiteningMode::kNone:
      return "none";
    case WhiteningMode::kDiagonal:
      return "diagonal";
    default:
      return "full";
  }
}

FloorMode floor_mode(const std::string& name) {
  if (name == "absolute") return FloorMode::kAbsolute;
  if (name == "relative") return FloorMode::kRelative;
  TORCH_CHECK_VALUE(false, "floor_mode must be 'absolute' or 'relative', not '", name, "'");
}

std::string to_string(FloorMode mode) {
  return mode == FloorMode::kAbsolute ? "absolute" : "relative";
}

Whitener Whitener::none() { return Whitener(WhiteningMode::kNone); }

Whitener Whitener::diagonal(const at::Tensor& stddev) {
  TORCH_CHECK_VALUE(stddev.dim() == 1, "stddev must be a vector [v], but its shape is ",
                    stddev.sizes());
  Whitener whitener(WhiteningMode::kDiagonal);
  whitener.stddev_ = stddev;
  return whitener;
}

Whitener Whitener::full(const at::Tensor& covariance, double floor, FloorMode floor_mode) {
  check_matrix(covariance, "covariance");
  TORCH_CHECK_VALUE(covariance.size(0) == covariance.size(1),
                    "covariance must be square, but its shape is ", covariance.sizes());
  TORCH_CHECK_VALUE(std::isfinite(floor) && floor >= 0.0,
                    "floor must be finite and at least 0, but it is ", floor);
  const at::Tensor sigma = covariance.to(compute_dtype(covariance));
  auto [eigenvalues, eigenvectors] = at::linalg_eigh(sigma, "U");

  Whitener whitener(WhiteningMode::kFull);
  whitener.floor_ = floor;
  if (floor_mode == FloorMode::kRelative) {
    whitener.floor_ *= eigenvalues.mean(at::kDouble).item<double>();
  }
  whitener.floored_ = eigenvalues.lt(whitener.floor_).sum().item<int64_t>();
  const at::Tensor floored = eigenvalues.clamp_min(whitener.floor_);
  TORCH_CHECK_LINALG(floored.min().item<double>() > 0.0,
                     "the covariance of the value gradients is singular and floor is ", floor,
                     "; give a floor above 0");
  whitener.root_ = at::mm(eigenvectors * floored.rsqrt(), eigenvectors.t());
  return whitener;
}

at::Tensor Whitener::transform(const at::Tensor& centred) const {
  check_matrix(centred, "centred");
  const at::ScalarType dtype = compute_dtype(centred);
  const at::Tensor rows = centred.to(dtype);
  if (mode_ == WhiteningMode::kNone) return rows;
  if (mode_ == WhiteningMode::kDiagonal) {
    check_rows(centred, "centred", stddev_.size(0));
    const double eps = dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                                            : std::numeric_limits<float>::epsilon();
    return rows / (stddev_.to(dtype) + eps);
  }
  check_rows(centred, "centred", root_.size(0));
  return at::mm(rows, root_.to(dtype));
}

}  // namespace stableedit
