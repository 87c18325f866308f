#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "refusal.hpp"

namespace hot_edit {

/// Lets so many threads pass at a time and so many more wait, first come, first served; who comes
/// then is refused.
class Gate {
 public:
  Gate(size_t places, size_t queue) : places_(places), queue_(queue) {}

  /// How many pass or wait.
  size_t present() const {
    const std::lock_guard lock(mutex_);
    return arrived_ - left_;
  }

  /// A place, until the end of its life.
  class Place {
   public:
    /// Waits for a place. \throws Refusal if too many are waiting already.
    explicit Place(Gate& gate) : gate_(gate) {
      std::unique_lock lock(gate_.mutex_);
      if (gate_.arrived_ - gate_.left_ >= gate_.places_ + gate_.queue_)
        throw Refusal(503, "too many generations are waiting; try again later");
      // Without numbers, a newcomer could overtake a thread that was woken but does not run yet.
      const uint64_t number = gate_.arrived_++;
      gate_.changed_.wait(lock, [&] { return number < gate_.left_ + gate_.places_; });
    }
    ~Place() {
      {
        const std::lock_guard lock(gate_.mutex_);
        ++gate_.left_;
      }
      gate_.changed_.notify_all();  // the next in turn is one of them
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
  uint64_t arrived_ = 0;
  uint64_t left_ = 0;
};

}  // namespace hot_edit
