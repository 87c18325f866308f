#include "stableedit/past_keys.hpp"

#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/triu.h>
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

// The solution of a system by its lower Cholesky factor. at::cholesky_solve would copy the factor.
at::Tensor solve_with(const at::Tensor& factor, const at::Tensor& right) {
  const at::Tensor half = at::linalg_solve_triangular(factor, right, /*upper=*/false);
  return at::linalg_solve_triangular(factor.t(), half, /*upper=*/true);
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
  past.moment_ = at::triu(moment.detach().to(compute_dtype(moment))).mul_(weight);
  past.packed_ = true;
  past.rows_ = at::empty({0, past.dim_}, past.moment_.options());
  return past;
}

// The upper triangle of the moment, wherever it is kept; not defined where there is none.
at::Tensor PastKeys::moment() const {
  if (!diagonal_.defined()) return moment_;
  at::Tensor moment = at::triu(factor_, 1).contiguous();
  moment.diagonal().copy_(diagonal_);
  return moment;
}

// Before the factor goes.
void PastKeys::unpack() {
  moment_ = moment();
  diagonal_.reset();
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
  unpack();
  if (!moment_.defined()) moment_ = at::zeros({dim_, dim_}, rows_.options());
  moment_ = add_symmetric_product(moment_, rows_);
  if (packed_) moment_.triu_();
  rows_ = at::empty({0, dim_}, rows_.options());
  pieces_.clear();
  factor_.reset();
  solved_.reset();
  gram_.reset();
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
  if (!packed_) return;
  diagonal_ = moment_.diagonal().clone();
  constexpr int64_t kBlock = 512;  // rows at once, to keep the temporary small
  for (int64_t begin = 0; begin < dim_; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, dim_);
    factor_.slice(0, begin, end).add_(at::triu(moment_.slice(0, begin, end), begin + 1));
  }
  moment_.reset();
}

at::Tensor PastKeys::base_solve(const at::Tensor& rows) const {
  if (factor_.defined()) return solve_with(factor_, rows.t()).t().contiguous();
  return rows / (ridge_ + weight_ * shrinkage_);
}

// Brings the derived state up to date for this weight and ridge.
void PastKeys::prepare(double weight, double ridge) {
  const bool same = weight == weight_ && ridge == ridge_;
  if (same && inner_.defined()) return;
  PastKeys next = *this;
  next.weight_ = weight;
  next.ridge_ = ridge;
  if (!same) {
    next.unpack();
    next.factor_.reset();
  }
  if (next.moment_.defined() && !next.factor_.defined()) next.factorise();
  if (!same || rank_ > 0) {  // the rows of a sketch are others whenever it shrinks
    next.solved_.reset();
    next.gram_.reset();
  }
  next.solve_rows();
  at::Tensor inner = next.gram_.clone();
  inner.diagonal().add_(1.0 / weight);
  next.inner_ = cholesky(inner);
  *this = std::move(next);
}

// Piece by piece, so that the bits do not depend on when this is called, before or after a restart.
// What a piece adds to the product of rows and solutions are the rows that end in it.
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
  at::Tensor gram = at::zeros({begin, begin}, rows_.options().dtype(at::kDouble));
  if (done > 0) gram.narrow(0, 0, done).narrow(1, 0, done).copy_(gram_);
  int64_t end = 0;
  for (const int64_t size : pieces_) {
    end += size;
    if (end <= done) continue;
    gram.narrow(0, end - size, size)
        .narrow(1, 0, end)
        .copy_(at::mm(rows_.narrow(0, end - size, size), solved_.narrow(0, 0, end).t()));
  }
  gram_ = gram;
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
  const at::Tensor mix = solve_with(inner_, cross).to(base.scalar_type());
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
  if (has_moment()) {
    const at::Tensor upper = moment().to(at::kDouble).triu();
    total = upper + upper.triu(1).t();
  }
  const at::Tensor rows = rows_.to(at::kDouble);
  total.addmm_(rows.t(), rows);
  total.diagonal().add_(shrinkage_);
  return total;
}

}  // namespace stableedit
