#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>

#include "stableedit/export.hpp"

namespace stableedit {

enum class WhiteningMode {
  kNone,      ///< value gradients and keys pass unchanged (the "no LN" ablation)
  kDiagonal,  ///< per dimension, (x - m) / (std + eps): ULTRAEDIT
  kFull,      ///< (x - m) Sigma^(-1/2): StableEdit
};

enum class FloorMode {
  kAbsolute,  ///< eigenvalues are raised to `floor`
  kRelative,  ///< eigenvalues are raised to `floor` times their mean, trace(Sigma) / v
};

/// "none", "diagonal" or "full"; \throws ValueError for anything else.
STABLEEDIT_API WhiteningMode whitening_mode(const std::string& name);
STABLEEDIT_API std::string to_string(WhiteningMode mode);

/// "absolute" or "relative"; \throws ValueError for anything else.
STABLEEDIT_API FloorMode floor_mode(const std::string& name);
STABLEEDIT_API std::string to_string(FloorMode mode);

struct STABLEEDIT_API WhiteningOptions {
  WhiteningMode mode = WhiteningMode::kFull;
  /// Lower bound on the eigenvalues of the covariance, at least 0. It keeps directions in which
  /// hardly any gradient was seen from being blown up.
  double floor = 0.1;
  /// The scale of a gradient depends on the loss and the model; a relative floor does not.
  FloorMode floor_mode = FloorMode::kRelative;
};

/// One fixed whitening transform of centred value gradients. Immutable, so free to share between
/// threads and to keep while the statistics move on.
class STABLEEDIT_API Whitener {
 public:
  /// Leaves its input as it is.
  static Whitener none();

  /// Divides by `stddev + eps`, where eps is the machine epsilon of the input's dtype (as the
  /// published code has it). \param stddev `[v]`, not negative.
  static Whitener diagonal(const at::Tensor& stddev);

  /// Symmetric inverse square root of the covariance with floored eigenvalues,
  ///     U max(Lambda, floor)^(-1/2) U^T.
  /// \param covariance `[v, v]`, symmetric positive semi-definite. The decomposition runs in its
  ///     dtype, float32 at least.
  /// \throws LinAlgError where the decomposition does not converge or an eigenvalue that is not
  ///     positive would be inverted (floor = 0 and a singular covariance).
  static Whitener full(const at::Tensor& covariance, double floor, FloorMode floor_mode);

  /// `[n, v]` centred value gradients -> `[n, v]` whitened ones, in the dtype of the input
  /// (float32 at least).
  at::Tensor transform(const at::Tensor& centred) const;

  WhiteningMode mode() const { return mode_; }

  /// Eigenvalue floor in the units of the covariance (0 unless the mode is full).
  double floor() const { return floor_; }

  /// How many eigenvalues the floor replaced (0 unless the mode is full).
  int64_t floored() const { return floored_; }

 private:
  explicit Whitener(WhiteningMode mode) : mode_(mode) {}

  WhiteningMode mode_;
  at::Tensor stddev_;  // [v], diagonal mode
  at::Tensor root_;    // [v, v], full mode
  double floor_ = 0.0;
  int64_t floored_ = 0;
};

}  // namespace stableedit
