#pragma once

#include <cstddef>
#include <filesystem>
#include <mutex>
#include <optional>
#include <stableedit/patch.hpp>
#include <string>

#include "live_weights.hpp"
#include "patch_store.hpp"

namespace hot_edit {

/// What an addition or removal did, and how long its parts took.
struct Change {
  LiveWeights::Pointer version;  ///< the first that has it
  std::shared_ptr<const stableedit::Patch> patch;
  double prepare_seconds = 0;  ///< reading and adding up, while generations go on
  double store_seconds = 0;    ///< making it durable, likewise
  double pause_seconds = 0;    ///< readers locked out
};

/// Adds and removes patches: checked, then durable, then visible, then acknowledged.
///
/// Concurrency: any thread; changes are carried out one after the other.
class Patches {
 public:
  /// Applies what `state` has stored. \param allowed the one directory that patch files come from
  /// \param max_bytes of a patch file  \throws std::runtime_error
  Patches(LiveWeights& weights, const std::filesystem::path& allowed,
          const std::filesystem::path& state, size_t max_bytes);
  ~Patches();

  /// \param file a name in the allowed directory, no path
  /// \param id what to call it; else its own id, or the file's name where that cannot be used
  /// \throws Refusal; nothing has changed then.
  Change add(const std::string& file, const std::optional<std::string>& id);
  Change remove(const std::string& id);

 private:
  std::string read_allowed(const std::string& file) const;

  LiveWeights& weights_;
  std::mutex mutex_;  // of a whole change
  PatchStore store_;
  int allowed_descriptor_ = -1;
  size_t max_bytes_;
};

}  // namespace hot_edit
