#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <memory>
#include <stableedit/low_rank.hpp>
#include <string>
#include <vector>

namespace torch::inductor {
class AOTIModelPackageLoader;
}

namespace hot_edit {

/// A weight that patches may change.
struct EditableWeight {
  std::string module;  ///< its weight is "<module>.weight"
  stableedit::WeightLayout layout;
  at::Tensor base;  ///< as exported; never written to
};

/// What a generation gave.
struct Answer {
  std::vector<int64_t> tokens;
  bool stopped = false;  ///< by a stop token, else by the limit
};

/// A language model that export_model.py has compiled.
///
/// The editable weights are arguments of the compiled code. Whoever runs it brings the tensors, so
/// calls with different weights can run side by side, and nobody has to wait for a change. (The
/// runner's own double buffer, `swap_constant_buffer`, waits for every running call and then
/// changes the weights of all of them: a generation is many calls, so it would see two models.)
///
/// Concurrency: immutable; any number of threads may generate, up to `concurrency` at a time inside
/// the compiled code.
class Model {
 public:
  /// \param directory what export_model.py wrote  \param concurrency calls that run side by side
  /// \throws std::runtime_error for a directory that is incomplete or of another version.
  Model(const std::filesystem::path& directory, size_t concurrency);
  ~Model();

  const std::vector<EditableWeight>& weights() const { return weights_; }
  const std::string& name() const { return name_; }
  const std::string& digest() const { return digest_; }  ///< as a patch's `base_digest`
  size_t max_length() const { return max_length_; }      ///< of prompt and answer, in tokens

  /// The most probable continuation. Every step runs over the whole sequence (README.md: why).
  /// \param weights in the order of `weights()`, of the same shapes and dtypes
  /// \param prompt 1 to max_length() - 1 ids
  Answer generate(const std::vector<at::Tensor>& weights, std::vector<int64_t> prompt,
                  size_t max_tokens) const;

 private:
  int64_t next_token(const std::vector<at::Tensor>& weights, std::vector<int64_t>& tokens) const;

  std::string name_;
  std::string digest_;
  size_t max_length_ = 0;
  std::vector<int64_t> stop_tokens_;
  std::vector<EditableWeight> weights_;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> compiled_;
};

}  // namespace hot_edit
