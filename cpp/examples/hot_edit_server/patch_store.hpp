#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <stableedit/patch.hpp>
#include <string>
#include <vector>

namespace hot_edit {

/// The applied patches on the disk: one file each, "<number>-<id>.safetensors", in the order of the
/// numbers. The directory is all there is, so a change is one file that appears or vanishes, and a
/// server that is killed at any moment finds a complete set.
///
/// Concurrency: one thread at a time; one process at a time, which a lock on the directory ensures.
class PatchStore {
 public:
  /// Makes the directory where there is none. \throws std::runtime_error if another server has it.
  explicit PatchStore(std::filesystem::path directory);
  ~PatchStore();
  PatchStore(const PatchStore&) = delete;
  PatchStore& operator=(const PatchStore&) = delete;

  /// What is stored, in order. \throws ValueError that names a damaged file.
  std::vector<stableedit::Patch> load() const;

  /// On the disk when they return. \throws std::filesystem::filesystem_error; nothing has changed.
  void add(const stableedit::Patch& patch);
  void remove(const std::string& id);

 private:
  std::filesystem::path directory_;
  int descriptor_ = -1;
  int64_t last_number_ = 0;
  std::map<std::string, std::filesystem::path> files_;  // by id
};

}  // namespace hot_edit
