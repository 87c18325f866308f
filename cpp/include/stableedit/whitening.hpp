#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "stableedit/export.hpp"
#include "stableedit/state_dict.hpp"

namespace stableedit {

/// What becomes of value gradients and keys before the ridge system.
enum class WhiteningMode {
  kNone,      ///< value gradients and keys pass unchanged (the "no LN" ablation)
  kDiagonal,  ///< per dimension, (x - m) / (std + eps): ULTRAEDIT
  kFull,      ///< (x - m) Sigma^(-1/2): StableEdit
};

/// What the floor on the eigenvalues is measured in.
enum class FloorMode {
  kAbsolute,  ///< eigenvalues are raised to `floor`
  kRelative,  ///< eigenvalues are raised to `floor` times their mean, trace(Sigma) / v
};

/// "none", "diagonal" or "full"; \throws ValueError for anything else.
STABLEEDIT_API WhiteningMode whitening_mode(const std::string& name);

/// "none", "diagonal" or "full".
STABLEEDIT_API std::string to_string(WhiteningMode mode);

/// "absolute" or "relative"; \throws ValueError for anything else.
STABLEEDIT_API FloorMode floor_mode(const std::string& name);

/// "absolute" or "relative".
STABLEEDIT_API std::string to_string(FloorMode mode);

/// How value gradients are whitened, and how often that is computed anew.
struct STABLEEDIT_API WhiteningOptions {
  WhiteningMode mode = WhiteningMode::kFull;  ///< full: StableEdit; diagonal: ULTRAEDIT
  /// Lower bound on the eigenvalues of the covariance, at least 0. It keeps directions in which
  /// hardly any gradient was seen from being blown up.
  double floor = 0.1;
  /// The scale of a gradient depends on the loss and the model; a relative floor does not.
  FloorMode floor_mode = FloorMode::kRelative;
  /// Reuse a decomposition until the sample count has grown by this fraction, in [0, 1]; 0
  /// decomposes every turn. Sigma moves by about n/nu a turn, so a long stream needs a handful of
  /// decompositions per doubling instead of one a turn.
  double refresh = 0.0;
  /// Decompose anyway when a turn, all its rows counted, is whitened to a mean square that exceeds
  /// by more than this factor, above 1, what the covariance at the last decomposition lets expect:
  /// such a turn has changed the covariance, and only one that knows it bounds what it is whitened
  /// to. (A fall needs no watch: what was seen keeps counting, so between two decompositions the
  /// covariance shrinks by no more than `refresh` allows.)
  double drift_limit = 2.0;
  /// True as published: value gradients are whitened about their running mean, and targets weighted
  /// by the squared norms of the normalised keys. False: value gradients are whitened by their
  /// second moment about zero, E[g g^T] = Sigma + m m^T, and targets are not weighted. Then the
  /// update never raises the loss to first order, however few rows there are: with D = A^(-1) H^T V
  /// and V = -G P, it is lowered by tr(H A^(-1) H^T G P G^T), and both factors are positive
  /// semi-definite. About the mean, the first rows of a stream (one fact!) have hardly anything
  /// left to whiten.
  bool centred = true;

  /// \throws ValueError for a field out of range.
  void check() const;
};

/// One fixed whitening transform of centred value gradients.
/// Concurrency: immutable, so any number of threads may share one, and keep it while the statistics
/// move on.
class STABLEEDIT_API Whitener {
 public:
  /// Leaves its input as it is.
  static Whitener none();

  /// Divides by `stddev + eps`, where eps is the machine epsilon of the input's dtype (as the
  /// published code has it). \param stddev `[v]`, not negative.
  static Whitener diagonal(const at::Tensor& stddev);

  /// Symmetric inverse square root of the covariance with floored eigenvalues,
  ///     U max(Lambda, floor)^(-1/2) U^T = f I + U_r (Lambda_r^(-1/2) - f) U_r^T
  ///
  /// over the r eigenpairs above the floor, with f = floor^(-1/2).
  /// \param covariance `[v, v]`, symmetric positive semi-definite. The decomposition runs in its
  ///     dtype, float32 at least, and reads the upper triangle.
  /// \param floor finite, at least 0  \param floor_mode what `floor` is measured in
  /// \param reused form the root as one matrix, which costs as much as applying the factors to a
  ///     few thousand rows and makes every application after that cheaper
  /// \throws LinAlgError where the decomposition does not converge or an eigenvalue that is not
  ///     positive would be inverted (floor = 0 and a singular covariance).
  static Whitener full(at::Tensor covariance, double floor, FloorMode floor_mode,
                       bool reused = false);

  /// `[n, v]` centred value gradients -> `[n, v]` whitened ones, in the dtype of the input
  /// (float32 at least).
  at::Tensor transform(const at::Tensor& centred) const;

  WhiteningMode mode() const { return mode_; }  ///< by which of the three it was made

  /// v (0 unless the mode is full).
  int64_t dim() const { return dim_; }

  /// Eigenvalue floor in the units of the covariance (0 unless the mode is full).
  double floor() const { return floor_; }

  /// How many eigenvalues the floor replaced (0 unless the mode is full).
  int64_t floored() const { return floored_; }

  /// Mean square of whitened gradients that have the covariance exactly: 1, less what the floor
  /// takes from the eigenvalues below it. 0 where unknown: unless the mode is full, and in a state
  /// of file version 1.
  double mean_square() const { return mean_square_; }

  StateDict state_dict() const;  ///< see stableedit::StateDict

  /// The way back. \throws ValueError for a state that is not of this class.
  static Whitener from_state_dict(const StateDict& state);

 private:
  explicit Whitener(WhiteningMode mode) : mode_(mode) {}

  WhiteningMode mode_;
  at::Tensor stddev_;   // [v], diagonal mode
  at::Tensor root_;     // [v, v], full mode; undefined where the factors are applied one by one
  at::Tensor vectors_;  // [v, r], full mode without root_: U_r
  at::Tensor scales_;   // [r], Lambda_r^(-1/2) - base_
  double base_ = 0.0;   // floor^(-1/2), or 0 where no eigenvalue is floored
  int64_t dim_ = 0;
  double floor_ = 0.0;
  int64_t floored_ = 0;
  double mean_square_ = 0.0;
};

}  // namespace stableedit
