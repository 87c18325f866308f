#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "stableedit/export.hpp"
#include "stableedit/moments.hpp"
#include "stableedit/niw.hpp"
#include "stableedit/state_dict.hpp"
#include "stableedit/whitening.hpp"

namespace stableedit {

/// What a LifelongNormalizer keeps and how it normalises.
struct STABLEEDIT_API NormalizerOptions {
  WhiteningOptions whitening;  ///< of the value gradients; keys are never whitened fully
  NiwPrior prior;              ///< of the value tracker; counts with full whitening only
  /// See RunningMoments: reproduces the published ULTRAEDIT statistics. Full whitening refuses it.
  bool unbiased_batches = false;
};

/// Lifelong Normalization of one edited module, or of all edited modules of one shape when their
/// statistics are pooled: running moments of the keys, of the value gradients, and, for full
/// whitening, the Normal-Inverse-Wishart tracker with its current whitener.
///
/// Fold a turn in with `observe` before normalising it. Value semantics: a copy is an O(1)
/// snapshot; assigning it back undoes whatever was observed since.
/// Concurrency: const members may be called from several threads; all others need exclusive access,
/// `normalize_value_gradients` too (it may renew the whitener).
class STABLEEDIT_API LifelongNormalizer {
 public:
  /// \param key_dim k  \param value_dim v  \param options whitening and prior
  /// \throws ValueError for an option out of range.
  LifelongNormalizer(int64_t key_dim, int64_t value_dim, NormalizerOptions options = {});

  /// Folds in keys `[n, k]` and value gradients `[n, v]` of one batch.
  /// \throws ValueError for shapes that do not fit or values that are not finite; the statistics
  ///     are then as they were.
  void observe(const at::Tensor& keys, const at::Tensor& value_gradients);

  /// Folds in several batches at once, at the cost of one scatter product: the modules of a pool.
  void observe(const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& value_gradients);

  /// Folds in everything `other` has seen (same dimensions and options). The next
  /// `normalize_value_gradients` decomposes anew.
  void merge(const LifelongNormalizer& other);

  /// (h - mean) / (std + eps), `[n, k]`; the keys themselves when whitening is off.
  at::Tensor normalize_keys(const at::Tensor& keys) const;

  /// Whitened value gradients, `[n, v]`.
  /// \param value_gradients `[n, v]`
  /// \param mode overrides the configured mode downwards (diagonal turns of the published warm-up);
  ///     full whitening falls back to diagonal while nu <= v + 1, as in the paper.
  at::Tensor normalize_value_gradients(const at::Tensor& value_gradients,
                                       std::optional<WhiteningMode> mode = std::nullopt);

  /// The mode that `normalize_value_gradients` will use now.
  WhiteningMode effective_mode(std::optional<WhiteningMode> mode = std::nullopt) const;

  int64_t key_dim() const { return key_moments_.dim(); }         ///< k
  int64_t value_dim() const { return value_moments_.dim(); }     ///< v
  int64_t count() const { return key_moments_.count(); }         ///< answer tokens observed so far
  const NormalizerOptions& options() const { return options_; }  ///< as constructed

  /// Moments of the keys, of dimension k.
  const RunningMoments& key_moments() const { return key_moments_; }

  /// Moments of the value gradients, of dimension v.
  const RunningMoments& value_moments() const { return value_moments_; }

  /// Only with full whitening.
  const std::optional<NormalInverseWishart>& value_tracker() const { return value_tracker_; }

  /// The full whitener of the last `normalize_value_gradients`, if there was one.
  const std::optional<Whitener>& whitener() const { return whitener_; }

  /// How many eigendecompositions were computed so far.
  int64_t decompositions() const { return decompositions_; }

  /// Everything that later results depend on, options and current whitener included; see
  /// stableedit::StateDict.
  StateDict state_dict() const;

  /// The way back. \throws ValueError for a state that is not of this class.
  static LifelongNormalizer from_state_dict(const StateDict& state);

 private:
  void keep(Whitener whitener);
  bool outgrown(const std::vector<at::Tensor>& value_gradients) const;

  NormalizerOptions options_;
  RunningMoments key_moments_;
  RunningMoments value_moments_;
  std::optional<NormalInverseWishart> value_tracker_;
  int64_t decompositions_ = 0;
  std::optional<Whitener> whitener_;
  at::ScalarType whitener_dtype_ = at::kFloat;
  double whitener_nu_ = 0.0;  // nu at which whitener_ was computed
  at::Tensor probes_;         // [p, v], a function of whitener_: see `outgrown`
};

}  // namespace stableedit
