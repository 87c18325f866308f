#include "metrics.hpp"

#include <algorithm>
#include <cstdio>

namespace hot_edit {
namespace {

const std::vector<double> kPerceptible{0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50};
const std::vector<double> kShort{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1};
const std::vector<double> kTiny{1e-7, 2e-7, 5e-7, 1e-6, 2e-6, 5e-6, 1e-5, 1e-4, 1e-3, 1e-2};

std::string digits(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", value);
  return buffer;
}

void head(std::string& text, const std::string& name, const std::string& help,
          const std::string& type) {
  text += "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

}  // namespace

Histogram::Histogram(std::vector<double> bounds)
    : bounds_(std::move(bounds)), counts_(bounds_.size() + 1) {}

void Histogram::observe(double seconds) {
  const std::lock_guard lock(mutex_);
  ++counts_[std::ranges::lower_bound(bounds_, seconds) - bounds_.begin()];
  sum_ += seconds;
}

void Histogram::write(std::string& text, const std::string& name, const std::string& help) const {
  const std::lock_guard lock(mutex_);
  head(text, name, help, "histogram");
  uint64_t below = 0;
  for (size_t index = 0; index < counts_.size(); ++index) {
    below += counts_[index];
    const std::string bound = index < bounds_.size() ? digits(bounds_[index]) : "+Inf";
    text += name + "_bucket{le=\"" + bound + "\"} " + std::to_string(below) + "\n";
  }
  text += name + "_sum " + digits(sum_) + "\n";
  text += name + "_count " + std::to_string(below) + "\n";
}

Metrics::Metrics() : generation(kPerceptible), prepare(kShort), store(kShort), pause(kTiny) {}

void Metrics::request(const std::string& endpoint, int status) {
  const std::lock_guard lock(mutex_);
  ++requests_[{endpoint, status}];
}

std::string Metrics::text(const std::map<std::string, double>& gauges) const {
  std::string text;
  head(text, "hot_edit_requests_total", "Answered requests.", "counter");
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, count] : requests_)
      text += "hot_edit_requests_total{endpoint=\"" + key.first + "\",status=\"" +
              std::to_string(key.second) + "\"} " + std::to_string(count) + "\n";
  }
  generation.write(text, "hot_edit_generation_seconds", "Time of a generation without waiting.");
  prepare.write(text, "hot_edit_prepare_seconds", "Time to make a version of the weights.");
  store.write(text, "hot_edit_store_seconds", "Time to make a change durable.");
  pause.write(text, "hot_edit_pause_seconds", "Time for which a change locks readers out.");
  for (const auto& [name, value] : gauges) {
    head(text, name, "Now.", "gauge");
    text += name + " " + digits(value) + "\n";
  }
  return text;
}

}  // namespace hot_edit
