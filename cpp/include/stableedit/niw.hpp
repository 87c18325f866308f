#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stableedit/export.hpp"
#include "stableedit/state_dict.hpp"

namespace stableedit {

/// Prior of a NormalInverseWishart with mean zero and scatter `psi * I`.
struct STABLEEDIT_API NiwPrior {
  double kappa = 0.0;  ///< kappa0, pseudo-count of the mean, at least 0
  double psi = 0.0;    ///< Psi0 = psi * I (the paper's eps0; the published code has 0), at least 0
  double nu = 0.0;     ///< nu0, degrees of freedom, at least 0
};

/// Normal-Inverse-Wishart tracker of value gradients: the posterior (m, kappa, Psi, nu) of
/// StableEdit, Algorithm 1.
///
///     m' = m + n/(kappa+n) (xbar - m)            kappa' = kappa + n      nu' = nu + n
///     Psi' = Psi + S + kappa n/(kappa+n) (xbar - m)(xbar - m)^T
///
/// Held as the sufficient statistics (count, mean, scatter) of the data in float64, with the prior
/// applied when the posterior is read. Updating and merging are therefore associative and
/// commutative, and a merge of two trackers does not count the prior twice.
///
/// Value semantics: a copy is an O(1) snapshot (updates replace the state tensors).
/// Concurrency: const members may be called from several threads; updates need exclusive access.
class STABLEEDIT_API NormalInverseWishart {
 public:
  /// \param dim dimension v of the value gradients, at least 1
  /// \param prior the paper's (0, 0, eps0 I, 0), or none, as the published code has it
  explicit NormalInverseWishart(int64_t dim, NiwPrior prior = {});

  /// Folds in a batch `[n, v]` of any floating dtype; n = 0 changes nothing. The product
  /// G^T G runs in the batch's dtype (float32 at least) and is accumulated in float64.
  /// Cost: one symmetric rank-n product.
  void update(const at::Tensor& batch);

  /// Folds in several batches of one dtype as one, without joining them first: modules that share
  /// statistics.
  void update(const std::vector<at::Tensor>& batches);

  /// Folds in everything `other` has seen. Both must have the same dimension and prior.
  void merge(const NormalInverseWishart& other);

  int64_t dim() const { return mean_.size(0); }     ///< v
  int64_t count() const { return count_; }          ///< rows folded in so far, without the prior
  const NiwPrior& prior() const { return prior_; }  ///< as constructed

  /// Pseudo-count of the mean, kappa0 + count.
  double kappa() const { return prior_.kappa + static_cast<double>(count_); }

  /// Degrees of freedom, nu0 + count.
  double nu() const { return prior_.nu + static_cast<double>(count_); }

  /// Posterior mean m, `[v]` float64.
  at::Tensor mean() const;

  /// Posterior scatter Psi, `[v, v]` float64, symmetric.
  at::Tensor psi() const;

  /// True once nu > v + 1, from where the expected covariance exists.
  bool has_covariance() const { return nu() > static_cast<double>(dim()) + 1.0; }

  /// Expected covariance Psi / (nu - v - 1), `[v, v]` float64, symmetric.
  /// \throws ValueError while nu <= v + 1.
  at::Tensor covariance() const;

  /// The same in `dtype` with only its upper triangle meaningful, which is all that a symmetric
  /// eigendecomposition reads: one `[v, v]` tensor of memory.
  at::Tensor covariance_upper(at::ScalarType dtype) const;

  /// Expected second moment about zero, Psi / (nu - v - 1) + m m^T, in `dtype` with only its upper
  /// triangle meaningful.
  /// \throws ValueError while nu <= v + 1.
  at::Tensor second_moment_upper(at::ScalarType dtype) const;

  StateDict state_dict() const;  ///< see stableedit::StateDict

  /// The way back. \throws ValueError for a state that is not of this class.
  static NormalInverseWishart from_state_dict(const StateDict& state);

 private:
  void add_prior(at::Tensor& psi) const;
  double covariance_divisor() const;

  int64_t count_ = 0;
  at::Tensor mean_;     // [v], of the data alone
  at::Tensor scatter_;  // [v, v], of the data alone; only the upper triangle is kept up to date
  NiwPrior prior_;
};

}  // namespace stableedit
