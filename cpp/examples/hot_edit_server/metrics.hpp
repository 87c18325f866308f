#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace hot_edit {

/// Durations in buckets, as Prometheus has them.
class Histogram {
 public:
  /// \param bounds upper bounds of the buckets in seconds, ascending
  explicit Histogram(std::vector<double> bounds);
  void observe(double seconds);
  void write(std::string& text, const std::string& name, const std::string& help) const;

 private:
  mutable std::mutex mutex_;
  std::vector<double> bounds_;
  std::vector<uint64_t> counts_;  // one more than bounds
  double sum_ = 0;
};

/// What GET /metrics tells, in the text format of Prometheus. Concurrency: any thread.
class Metrics {
 public:
  Metrics();
  void request(const std::string& endpoint, int status);

  Histogram generation;  ///< seconds from getting a place to the answer
  Histogram prepare;     ///< seconds to make a version, beside the generations
  Histogram store;       ///< seconds to make a change durable
  Histogram pause;       ///< seconds for which readers of the weights were locked out

  /// \param gauges name and value of what is so now
  std::string text(const std::map<std::string, double>& gauges) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, uint64_t> requests_;
};

}  // namespace hot_edit
