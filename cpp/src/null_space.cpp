#include "stableedit/null_space.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "checks.hpp"

namespace stableedit {
namespace {

// Eigenvalues of a second moment are at least 0, but for the rounding of their decomposition.
void check_semidefinite(const at::Tensor& eigenvalues) {
  const auto lowest = eigenvalues[0].item<double>();
  const double size = std::max(std::abs(lowest), std::abs(eigenvalues[-1].item<double>()));
  const double epsilon = eigenvalues.scalar_type() == at::kDouble
                             ? std::numeric_limits<double>::epsilon()
                             : double(std::numeric_limits<float>::epsilon());
  const double rounding = 10.0 * epsilon * static_cast<double>(eigenvalues.size(0)) * size;
  TORCH_CHECK_VALUE(lowest >= -rounding, "moment must be a second moment, but it has the ",
                    "eigenvalue ", lowest, "; those of a second moment are at least 0");
}

}  // namespace

NullSpace::NullSpace(const at::Tensor& moment, double threshold, bool relative) {
  check_matrix(moment, "moment");
  TORCH_CHECK_VALUE(moment.size(0) == moment.size(1) && moment.size(0) > 0,
                    "moment must be square [k, k], but its shape is ", moment.sizes());
  TORCH_CHECK_VALUE(std::isfinite(threshold) && threshold > 0.0,
                    "threshold must be finite and positive, but it is ", threshold);
  check_finite(moment, "moment");
  const auto [eigenvalues, eigenvectors] =  // ascending
      at::linalg_eigh(moment.detach().to(compute_dtype(moment)), "U");
  check_semidefinite(eigenvalues);
  const auto mean = eigenvalues.mean(at::kDouble).item<double>();
  threshold_ = relative ? threshold * mean : threshold;
  const int64_t dim = eigenvalues.size(0);
  const int64_t rank = eigenvalues.lt(threshold_).sum().item<int64_t>();
  TORCH_CHECK_VALUE(rank > 0, "a threshold of ", threshold_,
                    " leaves no null space: the least eigenvalue of the second moment is ",
                    eigenvalues[0].item<double>(), ", the mean ", mean,
                    "; take a larger threshold, and the mean over keys for the moment");
  complement_ = dim - rank < rank;
  basis_ = (complement_ ? eigenvectors.slice(1, rank) : eigenvectors.slice(1, 0, rank))
               .clone(at::MemoryFormat::Contiguous);  // not a view of all k x k
}

NullSpace::NullSpace(at::Tensor basis, bool complement, double threshold)
    : basis_(std::move(basis)), complement_(complement), threshold_(threshold) {}

at::Tensor NullSpace::project(const at::Tensor& keys) const {
  check_rows(keys, "keys", dim());
  TORCH_CHECK_VALUE(keys.device() == basis_.device(), "the null space is on ", basis_.device(),
                    ", but keys is on ", keys.device());
  const at::Tensor rows = keys.detach().to(basis_.scalar_type());
  const at::Tensor part = at::mm(rows, basis_);
  const at::Tensor projected =
      complement_ ? at::addmm(rows, part, basis_.t(), 1.0, -1.0) : at::mm(part, basis_.t());
  return projected.to(compute_dtype(keys));
}

NullSpace NullSpace::to(at::ScalarType dtype) const {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "dtype must be float32 or float64, but it is ", dtype);
  return {basis_.to(dtype), complement_, threshold_};
}

}  // namespace stableedit
