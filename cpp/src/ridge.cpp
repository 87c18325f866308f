#include "stableedit/ridge.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "checks.hpp"

namespace stableedit {
namespace {

// (gram + ridge I)^(-1) rhs for a symmetric positive semi-definite Gram matrix, in float64.
at::Tensor solve_gram(const at::Tensor& gram, const at::Tensor& rhs, double ridge) {
  at::Tensor system = gram.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  system.diagonal().add_(ridge);
  const at::Tensor right = rhs.to(at::kDouble);
  const auto [factor, info] = at::linalg_cholesky_ex(system);
  // Without a ridge, dependent keys leave pivots that are nothing but the Gram matrix's rounding:
  // as likely positive as negative.
  const double precision = 10.0 * static_cast<double>(system.size(0)) *
                           (gram.scalar_type() == at::kDouble
                                ? std::numeric_limits<double>::epsilon()
                                : static_cast<double>(std::numeric_limits<float>::epsilon()));
  const bool regular =
      info.item<int32_t>() == 0 &&
      (ridge > 0.0 ||
       factor.diagonal().square().gt(system.diagonal() * precision).all().item<bool>());
  if (regular) return at::cholesky_solve(right, factor);

  check_finite(system, "keys");
  const auto [eigenvalues, eigenvectors] = at::linalg_eigh(system);
  const double cutoff = precision * eigenvalues.abs().max().item<double>();
  const at::Tensor inverse =
      at::where(eigenvalues > cutoff, eigenvalues.reciprocal(), at::zeros_like(eigenvalues));
  return at::mm(eigenvectors * inverse, at::mm(eigenvectors.t(), right));
}

struct Problem {
  at::Tensor keys;
  at::Tensor targets;
};

Problem check_problem(const at::Tensor& keys, const at::Tensor& targets, double ridge) {
  check_matrix(keys, "keys");
  check_matrix(targets, "targets");
  check_same_rows(keys, "keys", targets, "targets");
  TORCH_CHECK_VALUE(std::isfinite(ridge) && ridge >= 0.0,
                    "ridge must be finite and at least 0, but it is ", ridge);
  check_finite(targets, "targets");
  return {keys.to(compute_dtype(keys)), targets.to(compute_dtype(targets))};
}

// A system of the rows costs n^2 k + n^3 / 3 + 2 n^2 v, half of it in float64; one of the key's
// dimensions 2 n k (k + 2 v) in float64. They are equal at about twice as many rows as dimensions.
bool many_rows(const Problem& problem) { return problem.keys.size(0) > 2 * problem.keys.size(1); }

// (I_n + Y H^T)^(-1) V = V - Y (I_k + H^T Y)^(-1) H^T V in float64, [n, v], by a k x k system. What
// is left of V is small beside it, so nothing here is in float32.
at::Tensor push_through(const at::Tensor& y, const Problem& problem) {
  const at::Tensor h = problem.keys.to(at::kDouble);
  const at::Tensor v = problem.targets.to(at::kDouble);
  at::Tensor system = at::mm(h.t(), y.to(at::kDouble));
  check_finite(system, "keys");
  system.diagonal().add_(1.0);
  return at::addmm(v, y.to(at::kDouble), at::linalg_solve(system, at::mm(h.t(), v)), 1.0, -1.0);
}

// X = (H H^T + ridge I_n)^(-1) V in float64, [n, v]
at::Tensor dual_coefficients(const Problem& problem, double ridge) {
  if (ridge > 0.0 && many_rows(problem)) {
    return push_through(problem.keys.to(at::kDouble) / ridge, problem) / ridge;
  }
  return solve_gram(at::mm(problem.keys, problem.keys.t()), problem.targets, ridge);
}

}  // namespace

at::Tensor solve_ridge(const at::Tensor& keys, const at::Tensor& targets, double ridge,
                       RidgeForm form) {
  const Problem problem = check_problem(keys, targets, ridge);
  const at::Tensor& h = problem.keys;
  const bool dual =
      form == RidgeForm::kDual || (form == RidgeForm::kAuto && h.size(0) <= h.size(1));
  if (dual) return at::mm(h.t(), dual_coefficients(problem, ridge).to(h.scalar_type()));
  const at::Tensor moment = at::mm(h.t(), problem.targets.to(h.scalar_type()));
  return solve_gram(at::mm(h.t(), h), moment, ridge).to(h.scalar_type());
}

LowRankUpdate ridge_update(const at::Tensor& keys, const at::Tensor& targets, double ridge) {
  const Problem problem = check_problem(keys, targets, ridge);
  const at::Tensor x = dual_coefficients(problem, ridge);
  // (H H^T + ridge I) X = V gives ||X^T H||^2 = <X, H H^T X> = <X, V - ridge X> without a product.
  const at::Tensor fit = problem.targets.to(at::kDouble).sub(x, ridge);
  const double square = x.flatten().dot(fit.flatten()).item<double>();
  TORCH_CHECK_LINALG(std::isfinite(square),
                     "the ridge system has no finite solution; check keys and targets");
  return LowRankUpdate(x.to(problem.keys.scalar_type()).t().contiguous(), problem.keys,
                       std::sqrt(std::max(0.0, square)));
}

LowRankUpdate ridge_update(const at::Tensor& keys, const at::Tensor& targets, double ridge,
                           PastKeys& past, double weight) {
  if (weight == 0.0 || past.count() == 0) return ridge_update(keys, targets, ridge);
  const Problem problem = check_problem(keys, targets, ridge);
  const at::Tensor right = past.solve(problem.keys, weight, ridge);
  const at::Tensor x = many_rows(problem)
                           ? push_through(right, problem)
                           : solve_gram(at::mm(right, problem.keys.t()), problem.targets, 1.0);
  TORCH_CHECK_LINALG(at::isfinite(x).all().item<bool>(),
                     "the ridge system has no finite solution; check keys and targets");
  return LowRankUpdate(x.to(right.scalar_type()).t().contiguous(), right);
}

at::Tensor solve_ridge(const at::Tensor& keys, const at::Tensor& targets, double ridge,
                       PastKeys& past, double weight) {
  return ridge_update(keys, targets, ridge, past, weight).dense().t();
}

}  // namespace stableedit
