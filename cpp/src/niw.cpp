#include "stableedit/niw.hpp"

#include <ATen/ops/addr.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "checks.hpp"
#include "symmetric_product.hpp"

namespace stableedit {

NormalInverseWishart::NormalInverseWishart(int64_t dim, NiwPrior prior) : prior_(prior) {
  TORCH_CHECK_VALUE(dim > 0, "dim must be at least 1, but it is ", dim);
  for (const double value : {prior.kappa, prior.psi, prior.nu}) {
    TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0.0,
                      "the prior's kappa, psi and nu must be finite and at least 0, but they are ",
                      prior.kappa, ", ", prior.psi, " and ", prior.nu);
  }
  mean_ = at::zeros({dim}, at::kDouble);
  scatter_ = at::zeros({dim, dim}, at::kDouble);
}

void NormalInverseWishart::update(const at::Tensor& batch) { update(std::vector{batch}); }

void NormalInverseWishart::update(const std::vector<at::Tensor>& batches) {
  int64_t n = 0;
  for (const at::Tensor& batch : batches) {
    check_rows(batch, "batch", dim());
    TORCH_CHECK_VALUE(batch.device() == batches[0].device() && batch.dtype() == batches[0].dtype(),
                      "the batches of one update must have one dtype and device");
    n += batch.size(0);
  }
  if (n == 0) return;
  const at::ScalarType dtype = compute_dtype(batches[0]);
  at::Tensor sum = at::zeros({dim()}, batches[0].options().dtype(at::kDouble));
  for (const at::Tensor& batch : batches) {
    sum += batch.detach().to(dtype).sum(0, /*keepdim=*/false, at::kDouble);
  }
  const at::Tensor batch_mean = sum / static_cast<double>(n);
  check_finite(batch_mean, "batch");  // NaN or infinity anywhere in a column shows in its mean
  if (count_ == 0) {                  // the state moves to the device of the first batch
    mean_ = mean_.to(batch_mean.device());
    scatter_ = scatter_.to(batch_mean.device());
  }
  TORCH_CHECK_VALUE(batch_mean.device() == mean_.device(), "the statistics are on ", mean_.device(),
                    ", but batch is on ", batch_mean.device());
  const double before = static_cast<double>(count_);
  const double share = static_cast<double>(n) / (before + static_cast<double>(n));
  const at::Tensor delta = batch_mean - mean_;
  // The Chan term is one more row of the symmetric product.
  const at::Tensor centred = at::empty({n + 1, dim()}, batches[0].options().dtype(dtype));
  int64_t row = 0;
  for (const at::Tensor& batch : batches) {
    at::Tensor differences = centred.slice(0, row, row + batch.size(0));
    at::sub_out(differences, batch.detach().to(dtype), batch_mean.to(dtype));
    row += batch.size(0);
  }
  centred.select(0, n).copy_(delta * std::sqrt(before * share));
  scatter_ = add_symmetric_product(scatter_, centred);
  mean_ = mean_ + delta * share;
  count_ += n;
}

void NormalInverseWishart::merge(const NormalInverseWishart& other) {
  TORCH_CHECK_VALUE(other.dim() == dim(), "cannot merge a tracker of dimension ", other.dim(),
                    " into a tracker of dimension ", dim());
  TORCH_CHECK_VALUE(other.prior_.kappa == prior_.kappa && other.prior_.psi == prior_.psi &&
                        other.prior_.nu == prior_.nu,
                    "cannot merge trackers with different priors");
  if (other.count_ == 0) return;
  if (count_ == 0) {
    *this = other;
    return;
  }
  TORCH_CHECK_VALUE(other.mean_.device() == mean_.device(), "cannot merge a tracker on ",
                    other.mean_.device(), " into a tracker on ", mean_.device());
  const double before = static_cast<double>(count_);
  const double share =
      static_cast<double>(other.count_) / (before + static_cast<double>(other.count_));
  const at::Tensor delta = other.mean_ - mean_;
  scatter_ = at::addr(scatter_ + other.scatter_, delta, delta, 1.0, before * share);
  mean_ = mean_ + delta * share;
  count_ += other.count_;
}

at::Tensor NormalInverseWishart::mean() const {
  if (count_ == 0) return mean_;
  return mean_ * (static_cast<double>(count_) / kappa());
}

at::Tensor NormalInverseWishart::psi() const {
  at::Tensor upper = scatter_.clone();
  add_prior(upper);
  return upper.triu().add_(upper.triu(1).t());
}

at::Tensor NormalInverseWishart::covariance() const {
  const double divisor = covariance_divisor();
  return psi().div_(divisor);
}

at::Tensor NormalInverseWishart::covariance_upper(at::ScalarType dtype) const {
  const double divisor = covariance_divisor();
  at::Tensor psi = scatter_;
  if (prior_.kappa > 0.0 || prior_.psi > 0.0) {
    psi = scatter_.clone();
    add_prior(psi);
  }
  return psi.to(dtype, /*non_blocking=*/false, /*copy=*/true).div_(divisor);
}

at::Tensor NormalInverseWishart::second_moment_upper(at::ScalarType dtype) const {
  const at::Tensor m = mean().to(dtype);
  return covariance_upper(dtype).addr_(m, m);
}

void NormalInverseWishart::add_prior(at::Tensor& psi) const {
  if (prior_.kappa > 0.0 && count_ > 0) {
    psi.addr_(mean_, mean_, 1.0, prior_.kappa * static_cast<double>(count_) / kappa());
  }
  if (prior_.psi > 0.0) psi.diagonal().add_(prior_.psi);
}

double NormalInverseWishart::covariance_divisor() const {
  TORCH_CHECK_VALUE(has_covariance(), "the covariance exists once nu > v + 1 = ", dim() + 1,
                    ", but nu is ", nu(), "; observe more value gradients first");
  return nu() - static_cast<double>(dim()) - 1.0;
}

}  // namespace stableedit
