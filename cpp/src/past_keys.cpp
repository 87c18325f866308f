#include "stableedit/past_keys.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "symmetric_product.hpp"

namespace stableedit {
namespace {

// Lower Cholesky factor of a matrix whose lower triangle is meaningful.
at::Tensor cholesky(const at::Tensor& system) {
  const auto [factor, info] = at::linalg_cholesky_ex(system);
  TORCH_CHECK_LINALG(info.item<int32_t>() == 0,
                     "weight * C + ridge * I of the past keys is not positive definite in ",
                     system.scalar_type(), "; a larger ridge or a smaller weight helps");
  return factor;
}

}  // namespace

PastKeys::PastKeys(int64_t dim, int64_t rank) : dim_(dim), rank_(rank) {
  TORCH_CHECK_VALUE(dim > 0, "dim must be at least 1, but it is ", dim);
  TORCH_CHECK_VALUE(rank >= 0, "rank must be at least 1, or 0 for the exact moment, but it is ",
                    rank);
}

PastKeys PastKeys::seeded(const at::Tensor& moment, double weight, int64_t count) {
  check_matrix(moment, "moment");
  TORCH_CHECK_VALUE(moment.size(0) == moment.size(1),
                    "moment must be square [k, k], but its shape is ", moment.sizes());
  TORCH_CHECK_VALUE(std::isfinite(weight) && weight > 0.0,
                    "weight must be finite and positive, but it is ", weight);
  TORCH_CHECK_VALUE(count > 0, "count must be at least 1, but it is ", count);
  check_finite(moment, "moment");
  PastKeys past(moment.size(0));
  past.count_ = count;
  past.moment_ = moment.detach().to(compute_dtype(moment)) * weight;
  past.rows_ = at::empty({0, past.dim_}, past.moment_.options());
  return past;
}

void PastKeys::update(const at::Tensor& keys) {
  check_rows(keys, "keys", dim_);
  if (keys.size(0) == 0) return;
  check_finite(keys, "keys");
  PastKeys next = *this;  // all of it or nothing
  next.append(keys.detach());
  if (rank_ == 0 && 4 * next.rows_.size(0) > dim_) next.fold();
  if (rank_ > 0 && next.rows_.size(0) - rank_ > rank_) next.shrink();
  *this = std::move(next);
}

void PastKeys::append(const at::Tensor& keys) {
  if (count_ == 0) {
    rows_ = keys.to(compute_dtype(keys), false, /*copy=*/true);
  } else {
    check_device(keys);
    const at::Tensor rows = keys.to(rows_.scalar_type());
    rows_ = at::cat(std::vector<at::Tensor>{rows_, rows});
  }
  pieces_.push_back(keys.size(0));
  count_ += keys.size(0);
  inner_.reset();
}

// Exact: the keys since the last fold become part of the moment.
void PastKeys::fold() {
  if (!moment_.defined()) moment_ = at::zeros({dim_, dim_}, rows_.options());
  moment_ = add_symmetric_product(moment_, rows_);
  rows_ = at::empty({0, dim_}, rows_.options());
  pieces_.clear();
  factor_.reset();
  solved_.reset();
}

// Sketched: the r largest directions stay, less the (r+1)-th squared singular value.
void PastKeys::shrink() {
  const at::Tensor gram = at::mm(rows_, rows_.t()).to(at::kDouble);
  const auto [eigenvalues, eigenvectors] = at::linalg_eigh(gram);  // ascending
  const int64_t dropped = gram.size(0) - rank_;
  const double delta = std::max(0.0, eigenvalues[dropped - 1].item<double>());
  // Row i of B is sqrt(lambda_i - delta) times the unit vector u_i^T rows / sqrt(lambda_i).
  const at::Tensor kept = eigenvalues.slice(0, dropped).clamp_min(std::max(delta, 1e-300));
  const at::Tensor scale = (1.0 - delta / kept).clamp_min_(0.0).sqrt_();
  const at::Tensor mix = eigenvectors.slice(1, dropped).mul(scale).to(rows_.scalar_type());
  rows_ = at::mm(mix.t(), rows_);
  pieces_ = {rank_};
  shrinkage_ += 0.5 * delta;
}

void PastKeys::factorise() {
  at::Tensor system = moment_ * weight_;
  system.diagonal().add_(ridge_);
  factor_ = cholesky(system.t());
  ++factorisations_;
}

at::Tensor PastKeys::base_solve(const at::Tensor& rows) const {
  if (factor_.defined()) return at::cholesky_solve(rows.t(), factor_).t().contiguous();
  return rows / (ridge_ + weight_ * shrinkage_);
}

// Brings the derived state up to date for this weight and ridge.
void PastKeys::prepare(double weight, double ridge) {
  const bool same = weight == weight_ && ridge == ridge_;
  if (same && inner_.defined()) return;
  PastKeys next = *this;
  next.weight_ = weight;
  next.ridge_ = ridge;
  if (!same) next.factor_.reset();
  if (moment_.defined() && !next.factor_.defined()) next.factorise();
  if (!same || !moment_.defined()) next.solved_.reset();  // without a moment, the base is a scalar
  next.solve_rows();
  at::Tensor inner = at::mm(rows_, next.solved_.t()).to(at::kDouble);
  inner.diagonal().add_(1.0 / weight);
  next.inner_ = cholesky(inner);
  *this = std::move(next);
}

// Piece by piece, so that the bits do not depend on when this is called, before or after a restart.
void PastKeys::solve_rows() {
  std::vector<at::Tensor> solved;
  int64_t begin = 0;
  const int64_t done = solved_.defined() ? solved_.size(0) : 0;
  if (done > 0) solved.push_back(solved_);
  for (const int64_t size : pieces_) {
    if (begin >= done) solved.push_back(base_solve(rows_.narrow(0, begin, size)));
    begin += size;
  }
  solved_ = solved.empty() ? rows_ : at::cat(solved);
}

at::Tensor PastKeys::solve(const at::Tensor& keys, double weight, double ridge) {
  check_rows(keys, "keys", dim_);
  TORCH_CHECK_VALUE(std::isfinite(weight) && weight >= 0.0,
                    "weight must be finite and at least 0, but it is ", weight);
  TORCH_CHECK_VALUE(std::isfinite(ridge) && ridge > 0.0,
                    "ridge must be finite and positive, but it is ", ridge);
  const at::Tensor rows = keys.detach().to(compute_dtype(keys));
  if (count_ == 0 || weight == 0.0) return rows / ridge;
  check_device(keys);
  prepare(weight, ridge);
  const at::Tensor base = base_solve(rows.to(rows_.scalar_type()));
  if (rows_.size(0) == 0) return base.to(rows.scalar_type());
  // Woodbury: (base + weight U^T U)^(-1), U the rows that the base does not hold.
  const at::Tensor cross = at::mm(rows_, base.t()).to(at::kDouble);
  const at::Tensor mix = at::cholesky_solve(cross, inner_).to(base.scalar_type());
  return at::addmm(base, mix.t(), solved_, 1.0, -1.0).to(rows.scalar_type());
}

void PastKeys::check_device(const at::Tensor& keys) const {
  TORCH_CHECK_VALUE(keys.device() == rows_.device(), "the past keys are on ", rows_.device(),
                    ", but keys is on ", keys.device());
}

at::Tensor PastKeys::second_moment() const {
  at::Tensor total = at::zeros({dim_, dim_}, at::kDouble);
  if (count_ == 0) return total;
  total = total.to(rows_.device());
  if (moment_.defined()) {
    const at::Tensor upper = moment_.to(at::kDouble).triu();
    total = upper + upper.triu(1).t();
  }
  const at::Tensor rows = rows_.to(at::kDouble);
  total.addmm_(rows.t(), rows);
  total.diagonal().add_(shrinkage_);
  return total;
}

}  // namespace stableedit
