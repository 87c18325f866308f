#include "patch_store.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <stableedit/serialization.hpp>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace hot_edit {
namespace fs = std::filesystem;
namespace {

[[noreturn]] void fail(const char* action, const fs::path& path) {
  throw fs::filesystem_error(action, path, std::error_code(errno, std::generic_category()));
}

// Of "<number>-<id>.safetensors"; 0 for any other name.
int64_t number_of(const std::string& name) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  const bool ours = error == std::errc() && *end == '-' && name.ends_with(".safetensors");
  return ours ? number : 0;
}

}  // namespace

PatchStore::PatchStore(fs::path directory) : directory_(std::move(directory)) {
  fs::create_directories(directory_);
  descriptor_ = open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor_ < 0) fail("cannot open the state directory", directory_);
  if (flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    close(descriptor_);
    throw std::runtime_error("the state directory " + directory_.string() +
                             " is in use by another server; give this one its own --state");
  }
  std::vector<fs::path> stored;
  for (const auto& entry : fs::directory_iterator(directory_)) {
    const std::string name = entry.path().filename();
    if (name.starts_with('.') && name.ends_with(".tmp")) {
      fs::remove(entry.path());  // a write that was killed
    } else if (number_of(name) > 0) {
      stored.push_back(entry.path());
    }
  }
  for (const fs::path& path : stored) {
    const std::string name = path.stem();
    const int64_t number = number_of(path.filename());
    files_[name.substr(name.find('-') + 1)] = path;
    last_number_ = std::max(last_number_, number);
  }
}

PatchStore::~PatchStore() { close(descriptor_); }

std::vector<stableedit::Patch> PatchStore::load() const {
  std::vector<std::pair<int64_t, std::string>> order;
  for (const auto& [id, path] : files_) order.emplace_back(number_of(path.filename()), id);
  std::ranges::sort(order);
  std::vector<stableedit::Patch> patches;
  for (const auto& [number, id] : order) {
    patches.push_back(stableedit::load_patch(files_.at(id)));
    patches.back().id = id;
  }
  return patches;
}

void PatchStore::add(const stableedit::Patch& patch) {
  const fs::path path =
      directory_ / (std::to_string(last_number_ + 1) + "-" + patch.id + ".safetensors");
  stableedit::save_patch(path, patch);
  ++last_number_;
  files_[patch.id] = path;
}

void PatchStore::remove(const std::string& id) {
  const auto file = files_.find(id);
  if (file == files_.end()) return;
  if (unlink(file->second.c_str()) != 0 && errno != ENOENT) fail("cannot remove", file->second);
  if (fsync(descriptor_) != 0) fail("cannot flush", directory_);
  files_.erase(file);
}

}  // namespace hot_edit
