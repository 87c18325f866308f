#include "stableedit/whitening.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>

#include <algorithm>
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

void WhiteningOptions::check() const {
  TORCH_CHECK_VALUE(std::isfinite(floor) && floor >= 0.0,
                    "floor must be finite and at least 0, but it is ", floor);
  TORCH_CHECK_VALUE(refresh >= 0.0 && refresh <= 1.0,
                    "refresh must be a fraction in [0, 1], but it is ", refresh);
  TORCH_CHECK_VALUE(std::isfinite(drift_limit) && drift_limit > 1.0,
                    "drift_limit must be finite and greater than 1, but it is ", drift_limit);
}

Whitener Whitener::none() { return Whitener(WhiteningMode::kNone); }

Whitener Whitener::diagonal(const at::Tensor& stddev) {
  TORCH_CHECK_VALUE(stddev.dim() == 1, "stddev must be a vector [v], but its shape is ",
                    stddev.sizes());
  Whitener whitener(WhiteningMode::kDiagonal);
  whitener.stddev_ = stddev;
  return whitener;
}

Whitener Whitener::full(at::Tensor covariance, double floor, FloorMode floor_mode, bool reused) {
  check_matrix(covariance, "covariance");
  TORCH_CHECK_VALUE(covariance.size(0) == covariance.size(1),
                    "covariance must be square, but its shape is ", covariance.sizes());
  TORCH_CHECK_VALUE(std::isfinite(floor) && floor >= 0.0,
                    "floor must be finite and at least 0, but it is ", floor);
  const auto [eigenvalues, eigenvectors] =  // ascending
      at::linalg_eigh(covariance.to(compute_dtype(covariance)), "U");
  covariance.reset();  // at 7B shapes, memory that the root may need

  Whitener whitener(WhiteningMode::kFull);
  whitener.dim_ = eigenvalues.size(0);
  whitener.floor_ = floor;
  if (floor_mode == FloorMode::kRelative) {
    whitener.floor_ *= eigenvalues.mean(at::kDouble).item<double>();
  }
  whitener.floored_ = eigenvalues.lt(whitener.floor_).sum().item<int64_t>();
  const bool invertible = whitener.floor_ > 0.0 || eigenvalues.min().item<double>() > 0.0;
  TORCH_CHECK_LINALG(invertible, "the covariance of the value gradients is singular and floor is ",
                     floor, "; give a floor above 0");
  const int64_t kept = whitener.dim_ - whitener.floored_;
  double kept_energy = static_cast<double>(kept);  // of eigenvalues below the floor, their share
  if (whitener.floored_ > 0) {
    const at::Tensor below = eigenvalues.narrow(0, 0, whitener.floored_).clamp_min(0.0);
    kept_energy += below.sum(at::kDouble).item<double>() / whitener.floor_;
  }
  whitener.mean_square_ = std::min(1.0, kept_energy / static_cast<double>(whitener.dim_));
  whitener.base_ = whitener.floored_ > 0 ? 1.0 / std::sqrt(whitener.floor_) : 0.0;
  whitener.scales_ = eigenvalues.narrow(0, whitener.floored_, kept).rsqrt().sub_(whitener.base_);
  // In memory of their own and by rows: products, and so results, are then the same bit for bit
  // after a restart from a file.
  whitener.vectors_ =
      eigenvectors.narrow(1, whitener.floored_, kept).clone(at::MemoryFormat::Contiguous);
  // Two products with U_r cost 4 n v r, one with the root 2 n v^2.
  if (reused && 2 * kept > whitener.dim_) {
    whitener.root_ = at::mm(whitener.vectors_ * whitener.scales_, whitener.vectors_.t());
    whitener.root_.diagonal().add_(whitener.base_);
    whitener.vectors_ = whitener.scales_ = at::Tensor();
  }
  return whitener;
}

at::Tensor Whitener::transform(const at::Tensor& centred) const {
  check_matrix(centred, "centred");
  const at::ScalarType dtype = compute_dtype(centred);
  at::Tensor rows = centred.to(dtype);
  if (mode_ == WhiteningMode::kNone) return rows;
  if (mode_ == WhiteningMode::kDiagonal) {
    check_rows(centred, "centred", stddev_.size(0));
    const double eps = dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                                            : std::numeric_limits<float>::epsilon();
    return rows / (stddev_.to(dtype) + eps);
  }
  check_rows(centred, "centred", dim_);
  if (root_.defined()) return at::mm(rows, root_.to(dtype));
  const at::Tensor vectors = vectors_.to(dtype);
  const at::Tensor coordinates = at::mm(rows, vectors).mul_(scales_.to(dtype));
  return at::addmm(rows, coordinates, vectors.t(), base_);
}

}  // namespace stableedit
