#pragma once

#include <cstddef>
#include <string>

#include "gate.hpp"
#include "live_weights.hpp"
#include "metrics.hpp"
#include "model.hpp"
#include "patches.hpp"
#include "tokenizer.hpp"

namespace httplib {
class Server;
struct Request;
struct Response;
}  // namespace httplib

namespace hot_edit {

struct ServiceOptions {
  size_t concurrency = 1;  ///< generations side by side
  size_t threads = 1;      ///< CPU threads of each
  size_t queue = 64;       ///< generations that may wait
  size_t max_tokens = 64;  ///< of an answer
  std::string token;       ///< bearer token; empty: none is asked for
};

/// The endpoints. Every refusal is {"error": "<a sentence>"} with a status of 4xx, or 503.
class Service {
 public:
  Service(const Model& model, const Tokenizer& tokenizer, LiveWeights& weights, Patches& patches,
          ServiceOptions options);

  /// Installs the endpoints. \param server must not outlive this object
  void install(httplib::Server& server);

 private:
  std::string generate(const std::string& body);
  std::string add_patch(const std::string& body);
  std::string remove_patch(const std::string& id);
  std::string list_patches() const;
  std::string health() const;
  std::string weight(const std::string& module) const;
  std::string report(const Change& change);
  bool authorized(const httplib::Request& request) const;

  const Model& model_;
  const Tokenizer& tokenizer_;
  LiveWeights& weights_;
  Patches& patches_;
  const ServiceOptions options_;
  Gate gate_;
  Metrics metrics_;
};

}  // namespace hot_edit
