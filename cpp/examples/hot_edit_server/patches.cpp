#include "patches.hpp"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stableedit/serialization.hpp>
#include <string_view>
#include <system_error>

#include "refusal.hpp"

namespace hot_edit {
namespace {

class Stopwatch {
 public:
  /// Seconds since the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

constexpr size_t kLongestId = 64;

// One component of a path that is no hidden file; so neither "..", nor "a/b".
bool is_plain_name(std::string_view name, size_t longest) {
  constexpr std::string_view kLetters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
  return !name.empty() && name.size() <= longest && name[0] != '.' &&
         name.find_first_not_of(kLetters) == std::string_view::npos;
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  operator int() const { return descriptor_; }

 private:
  int descriptor_;
};

std::shared_ptr<stableedit::Patch> parse(const std::string& bytes, const std::string& file) {
  // The sentence of a Refusal ends at a zero byte, which the names in a damaged file may have.
  try {
    auto patch = std::make_shared<stableedit::Patch>(stableedit::parse_patch(bytes, file));
    for (const auto& [module, change] : patch->modules) {
      if (module.find('\0') != std::string::npos)
        throw Refusal(422, file + " names a module with a zero byte");
    }
    return patch;
  } catch (const c10::Error& error) {
    std::string sentence = error.msg();
    std::ranges::replace(sentence, '\0', ' ');
    throw Refusal(422, sentence);
  }
}

}  // namespace

Patches::Patches(LiveWeights& weights, const std::filesystem::path& allowed,
                 const std::filesystem::path& state, size_t max_bytes)
    : weights_(weights), store_(state), max_bytes_(max_bytes) {
  for (stableedit::Patch& stored : store_.load()) {
    const std::string id = stored.id;
    try {
      weights_.publish(weights_.with(std::make_shared<stableedit::Patch>(std::move(stored))));
    } catch (const Refusal& refusal) {
      throw std::runtime_error("the stored patch '" + id + "' in " + state.string() +
                               " cannot be applied: " + refusal.what());
    }
  }
  allowed_descriptor_ = open(allowed.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (allowed_descriptor_ < 0)
    throw std::runtime_error("--patches " + allowed.string() + ": " +
                             std::generic_category().message(errno));
}

Patches::~Patches() { close(allowed_descriptor_); }

Change Patches::add(const std::string& file, const std::optional<std::string>& id) {
  const std::lock_guard lock(mutex_);
  Stopwatch watch;
  Change change;
  const auto patch = parse(read_allowed(file), file);
  // A patch may be called what is no file name, or nothing at all.
  if (!is_plain_name(patch->id, kLongestId)) patch->id = std::filesystem::path(file).stem();
  if (id) patch->id = *id;
  if (!is_plain_name(patch->id, kLongestId))
    throw Refusal(400,
                  "a patch is called by up to 64 letters, digits, '.', '_' and '-' (not first a "
                  "'.'), not '" +
                      patch->id + "'; give it another \"id\"");
  change.patch = patch;
  change.version = weights_.with(patch);
  change.prepare_seconds = watch.lap();
  store_.add(*patch);
  change.store_seconds = watch.lap();
  change.pause_seconds = std::chrono::duration<double>(weights_.publish(change.version)).count();
  return change;
}

Change Patches::remove(const std::string& id) {
  const std::lock_guard lock(mutex_);
  Stopwatch watch;
  Change change;
  for (const auto& patch : weights_.current()->patches) {
    if (patch->id == id) change.patch = patch;
  }
  change.version = weights_.without(id);
  change.prepare_seconds = watch.lap();
  store_.remove(id);
  change.store_seconds = watch.lap();
  change.pause_seconds = std::chrono::duration<double>(weights_.publish(change.version)).count();
  return change;
}

std::string Patches::read_allowed(const std::string& file) const {
  if (!is_plain_name(file, 200))
    throw Refusal(400,
                  "\"file\" must be the name of a file in the directory for patches, of letters, "
                  "digits, '.', '_' and '-' only");
  // Relative to the directory that was opened at the start, and never through a link.
  const File opened(
      openat(allowed_descriptor_, file.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
  if (opened < 0) {
    if (errno == ENOENT) throw Refusal(404, "the directory for patches has no file " + file);
    if (errno == ELOOP)
      throw Refusal(403, file + " is a symbolic link; copy the file itself there");
    throw Refusal(403, file + " cannot be opened: " + std::generic_category().message(errno));
  }
  struct stat status{};
  if (fstat(opened, &status) != 0 || !S_ISREG(status.st_mode))
    throw Refusal(403, file + " is not a regular file");
  if (size_t(status.st_size) > max_bytes_)
    throw Refusal(413, file + " has " + std::to_string(status.st_size) +
                           " bytes, more than the limit of " + std::to_string(max_bytes_));
  std::string bytes(status.st_size, '\0');
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = read(opened, bytes.data() + done, bytes.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) throw Refusal(422, file + " became shorter while it was read");
    done += got;
  }
  return bytes;
}

}  // namespace hot_edit
