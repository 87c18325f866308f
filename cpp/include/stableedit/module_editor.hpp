#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "stableedit/export.hpp"
#include "stableedit/low_rank.hpp"
#include "stableedit/normalizer.hpp"
#include "stableedit/past_keys.hpp"

namespace stableedit {

/// How a turn becomes an update.
struct STABLEEDIT_API EditOptions {
  double step_size = 3.5e-4;  ///< the paper's eta, positive
  double ridge = 10.0;        ///< weight of the penalty on the update's norm, positive
  /// Weight of the keys of earlier turns in the ridge, at least 0; 0 is StableEdit as published.
  double past_key_weight = 0.0;
};

/// (keys, value gradients) of a turn -> the update of one module's weight (StableEdit, Algorithm
/// 1):
///
///     V_i = - step_size * ||h_hat_i||^2 * g_hat_i
///     D   = (H^T H + past_key_weight C + ridge I)^(-1) H^T V,     W <- W + D^T
///
/// Where the normalizer is not centred (`WhiteningOptions::centred`), V_i = - step_size * g_hat_i.
/// C, the second moment of the keys of earlier turns, is ours; its weight is 0 unless asked for.
/// It never touches a weight: applying the result is the caller's business.
/// Several editors may share one normalizer (pooled statistics): then `observe` the turn of all of
/// them in the normalizer first and call `compute_update` for each.
/// Concurrency: `edit`, `compute_update` and `targets` need exclusive access to the editor, its
/// normalizer and its past keys, whoever else shares those; editors that share nothing may run in
/// parallel.
class STABLEEDIT_API ModuleEditor {
 public:
  /// An editor with statistics of its own.
  /// \param key_dim k  \param value_dim v
  /// \param normalizer how keys and value gradients are normalised
  /// \param options step size, ridge and past keys
  /// \throws ValueError for an option out of range.
  ModuleEditor(int64_t key_dim, int64_t value_dim, NormalizerOptions normalizer = {},
               EditOptions options = {});

  /// An editor on shared statistics.
  /// \param normalizer not null
  /// \param options step size, ridge and past keys
  /// \param past_keys of this module; null begins with none where options ask for past keys
  /// \throws ValueError for an option out of range.
  explicit ModuleEditor(std::shared_ptr<LifelongNormalizer> normalizer, EditOptions options = {},
                        std::shared_ptr<PastKeys> past_keys = nullptr);

  /// Observes the turn, computes its update and adds its keys to the past: the one call that a
  /// server makes.
  /// \param keys `[n, k]`  \param value_gradients `[n, v]`
  /// \throws ValueError for bad shapes or values, LinAlgError for numerical failure. In both cases
  ///     the statistics are as they were before the call.
  LowRankUpdate edit(const at::Tensor& keys, const at::Tensor& value_gradients);

  /// The update alone, from statistics that have already observed the turn.
  LowRankUpdate compute_update(const at::Tensor& keys, const at::Tensor& value_gradients,
                               std::optional<WhiteningMode> mode = std::nullopt);

  /// The ridge targets V, `[n, v]`.
  at::Tensor targets(const at::Tensor& keys, const at::Tensor& value_gradients,
                     std::optional<WhiteningMode> mode = std::nullopt);

  /// The statistics, to observe a turn or to go back to a snapshot of them.
  LifelongNormalizer& normalizer() { return *normalizer_; }

  /// The statistics.
  const LifelongNormalizer& normalizer() const { return *normalizer_; }

  /// The statistics, to share them with another editor.
  const std::shared_ptr<LifelongNormalizer>& shared_normalizer() const { return normalizer_; }

  const EditOptions& options() const { return options_; }  ///< as constructed

  /// Null where past keys take no part. Only `edit` adds to it; a caller of `compute_update`
  /// decides when a turn is over.
  const std::shared_ptr<PastKeys>& past_keys() const { return past_keys_; }

 private:
  std::shared_ptr<LifelongNormalizer> normalizer_;
  EditOptions options_;
  std::shared_ptr<PastKeys> past_keys_;
};

}  // namespace stableedit
