#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>

#include "refusal.hpp"

namespace hot_edit {

/// Lets so many threads pass at a time and so many more wait; who comes then is refused.
class Gate {
 public:
  Gate(size_t places, size_t queue) : places_(places), queue_(queue), free_(places) {}

  /// How many pass or wait.
  size_t present() const {
    const std::lock_guard lock(mutex_);
    return places_ - free_ + waiting_;
  }

  /// A place, until the end of its life.
  class Place {
   public:
    /// Waits for a place. \throws Refusal if too many are waiting already.
    explicit Place(Gate& gate) : gate_(gate) {
      std::unique_lock lock(gate_.mutex_);
      if (gate_.free_ == 0 && gate_.waiting_ >= gate_.queue_)
        throw Refusal(503, "too many generations are waiting; try again later");
      ++gate_.waiting_;
      gate_.changed_.wait(lock, [this] { return gate_.free_ > 0; });
      --gate_.waiting_;
      --gate_.free_;
    }
    ~Place() {
      {
        const std::lock_guard lock(gate_.mutex_);
        ++gate_.free_;
      }
      gate_.changed_.notify_one();
    }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

   private:
    Gate& gate_;
  };

 private:
  const size_t places_;
  const size_t queue_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  size_t free_;
  size_t waiting_ = 0;
};

}  // namespace hot_edit
