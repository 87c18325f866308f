#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stableedit/export.hpp"
#include "stableedit/state_dict.hpp"

namespace stableedit {

/// Second moment C = sum of h h^T over the keys of earlier turns of one module, and products with
/// the inverse of (weight C + ridge I): what keeps an update from disturbing what was edited
/// before.
///
/// Exact (rank 0): C as a k x k matrix in the dtype of the keys, float32 at least (0.8 GB for
/// float32 and k = 14336), with a Cholesky factor of weight C + ridge I. The keys since the
/// factorisation enter through the Woodbury identity, which is exact as well, until there are k / 4
/// of them: about there a new factorisation is cheaper.
///
/// Sketched (rank r): C ~ B^T B + shrinkage I with at most 2 r rows in B, by Robust Frequent
/// Directions (Luo et al. 2019, arXiv 1705.05067): exact up to 2 r keys, and after that off by at
/// most the sum of the eigenvalues of C beyond the j largest, over 2 (r - j), in spectral norm (any
/// j < r).
///
/// Value semantics: a copy is an O(1) snapshot, because updates replace the state tensors. The
/// state lives on the device of the first keys.
/// Concurrency: const members may be called from several threads; `update` and `solve` (which may
/// renew the factorisation) need exclusive access.
class STABLEEDIT_API PastKeys {
 public:
  /// \param dim dimension k of the keys, at least 1.  \param rank of the sketch; 0 for exact.
  explicit PastKeys(int64_t dim, int64_t rank = 0);

  /// Exact, and begun with C = weight * moment instead of nothing: what MEMIT holds an update off
  /// (Meng et al. 2023, arXiv 2210.07229, equation 14, with a mean over text for the moment). While
  /// no key is added to it, one factorisation serves for ever, kept with C in one matrix.
  /// Everything is computed in the dtype of the moment, float32 at least: float64 where the ridge
  /// is to be next to nothing.
  /// \param moment `[k, k]`, of which the upper triangle is read
  /// \param weight finite, positive
  /// \param count how many keys the moment stands for, at least 1: where `count()` begins
  /// \throws ValueError for a moment that is not square or not finite, and for a weight or count
  ///     out of range.
  static PastKeys seeded(const at::Tensor& moment, double weight = 1.0, int64_t count = 1);

  /// Folds in the keys of a turn, `[n, k]` of any floating dtype; n = 0 changes nothing.
  /// \throws ValueError for a shape that does not fit or values that are not finite; nothing is
  ///     changed then.
  void update(const at::Tensor& keys);

  /// H (weight C + ridge I)^(-1), `[n, k]` in the dtype of the keys (float32 at least). Costs two
  /// triangular solves of n rows, plus k^3 / 3 where the factorisation is new: after k / 4 more
  /// keys or with another weight or ridge.
  /// \param keys H `[n, k]`  \param weight finite, at least 0  \param ridge finite, positive
  /// \throws LinAlgError where ridge is so small beside weight C that the sum is not positive
  ///     definite in its dtype.
  at::Tensor solve(const at::Tensor& keys, double weight, double ridge);

  int64_t dim() const { return dim_; }    ///< k
  int64_t rank() const { return rank_; }  ///< of the sketch; 0 where exact

  /// How many keys were folded in, those of a seed included.
  int64_t count() const { return count_; }

  /// C, or what the sketch has for it, `[k, k]` float64. For looking at it: the whole matrix.
  at::Tensor second_moment() const;

  /// What Robust Frequent Directions has put on the diagonal (0 where exact).
  double shrinkage() const { return shrinkage_; }

  /// Fields: "dim", "rank", "count", "shrinkage", "pieces" [p], and where there are any "rows" [m,
  /// k] and "moment" [k, k] (upper triangle).
  StateDict state_dict() const;

  /// The way back. \throws ValueError for a state that is not of this class.
  static PastKeys from_state_dict(const StateDict& state);

  /// How often weight C + ridge I has been factorised.
  int64_t factorisations() const { return factorisations_; }

 private:
  bool has_moment() const { return moment_.defined() || diagonal_.defined(); }
  at::Tensor moment() const;
  void unpack();
  void append(const at::Tensor& keys);
  void fold();
  void shrink();
  void factorise();
  void prepare(double weight, double ridge);
  void solve_rows();
  at::Tensor base_solve(const at::Tensor& rows) const;
  void check_device(const at::Tensor& keys) const;

  int64_t dim_;
  int64_t rank_;
  int64_t count_ = 0;
  double shrinkage_ = 0.0;
  at::Tensor moment_;    // [k, k], upper triangle, of the keys that are not in rows_; exact only
  bool packed_ = false;  // begun with a seed: while there is a factor, its upper triangle is that
                         // of the moment, and moment_ is not defined
  at::Tensor diagonal_;  // [k], that of the moment then
  at::Tensor rows_;      // [m, k], keys since the last fold, or the sketch B
  std::vector<int64_t> pieces_;  // how many of rows_ came together

  // Functions of the above, bit for bit, for one weight and ridge. base = weight * moment + ridge
  // I, or its scalar (ridge + weight * shrinkage) I where there is no moment.
  double weight_ = 0.0;
  double ridge_ = 0.0;
  at::Tensor factor_;  // [k, k], Cholesky factor of base
  at::Tensor solved_;  // [m, k], rows_ base^(-1)
  at::Tensor gram_;  // [m, m] float64, rows_ base^(-1) rows_^T, of which the lower triangle is read
  at::Tensor inner_;  // [m, m] float64, Cholesky factor of gram_ + I / weight
  int64_t factorisations_ = 0;
};

}  // namespace stableedit
