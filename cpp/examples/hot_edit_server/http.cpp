#include "http.hpp"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <httplib.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <stableedit/safetensors.hpp>

#include "request_body.hpp"

namespace hot_edit {
namespace {

using Json = nlohmann::json;
using Status = int;

constexpr const char* kEndpoints =
    "the endpoints are POST /generate, GET and POST /patches, DELETE /patches/{id}, "
    "GET /weights/{module}, GET /health and GET /metrics";

// Generated text may end inside a character, and then is no valid UTF-8.
std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

// What a sentence quotes from a patch file may be anything.
std::string one_short_line(std::string text) {
  constexpr size_t kLongest = 600;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + " ...";
  for (char& letter : text) {
    if (uint8_t(letter) < ' ' || letter == 127) letter = ' ';
  }
  return text;
}

void refuse(httplib::Response& response, Status status, const std::string& sentence) {
  response.status = status;
  response.set_content(dump({{"error", one_short_line(sentence)}}), "application/json");
}

// Carries a request out; whatever goes wrong becomes a status and a sentence.
void answer(httplib::Response& response, const char* content_type,
            const std::function<std::string()>& action, Status success = 200) {
  try {
    response.set_content(action(), content_type);
    response.status = success;
  } catch (const Refusal& refusal) {
    refuse(response, refusal.status, refusal.what());
  } catch (const c10::Error& error) {
    refuse(response, 500, error.what_without_backtrace());
  } catch (const std::exception& error) {
    refuse(response, 500, error.what());
  }
}

// What a failure inside the HTTP library means.
std::string sentence_for(Status status, const httplib::Request& request) {
  switch (status) {
    case 404:
      return "there is no " + request.method.substr(0, 10) + " " + request.path.substr(0, 80) +
             "; " + kEndpoints;
    case 413:
      return "the body is too large";
    case 414:
      return "the address is too long";
    default:
      return status < 500 ? "this is not a valid HTTP request" : "the request failed";
  }
}

bool is_served(const std::string& method) {
  return method == "GET" || method == "HEAD" || method == "POST" || method == "DELETE";
}

// The label of the metrics: one of a fixed set, whatever is asked for.
std::string endpoint_of(const httplib::Request& request) {
  for (const char* name : {"/generate", "/patches", "/health", "/metrics"}) {
    if (request.path == name) return name;
  }
  if (request.path.rfind("/patches/", 0) == 0) return "/patches/{id}";
  if (request.path.rfind("/weights/", 0) == 0) return "/weights/{module}";
  return "other";
}

// Takes the same time wherever the first difference is.
bool same(const std::string& left, const std::string& right) {
  if (left.size() != right.size()) return false;
  unsigned char difference = 0;
  for (size_t index = 0; index < left.size(); ++index) difference |= left[index] ^ right[index];
  return difference == 0;
}

std::vector<std::string> ids(const Version& version) {
  std::vector<std::string> ids;
  for (const auto& patch : version.patches) ids.push_back(patch->id);
  return ids;
}

std::vector<std::string> modules(const stableedit::Patch& patch) {
  std::vector<std::string> names;
  for (const auto& [module, change] : patch.modules) names.push_back(module);
  return names;
}

// As JSON where it is; as the text that it is where it is not, or is nested so deeply that writing
// it again could exhaust the stack.
Json requests_of(const stableedit::Patch& patch) {
  constexpr int kDeepest = 32;
  bool deep = false;
  const auto watch_depth = [&](int depth, Json::parse_event_t, Json&) {
    deep = deep || depth > kDeepest;
    return !deep;
  };
  Json requests = Json::parse(patch.requests, watch_depth, /*allow_exceptions=*/false);
  return deep || requests.is_discarded() ? Json(patch.requests) : requests;
}

}  // namespace

Service::Service(const Model& model, const Tokenizer& tokenizer, LiveWeights& weights,
                 Patches& patches, ServiceOptions options)
    : model_(model),
      tokenizer_(tokenizer),
      weights_(weights),
      patches_(patches),
      options_(std::move(options)),
      gate_(options_.concurrency, options_.queue) {}

void Service::install(httplib::Server& server) {
  using httplib::Request;
  using httplib::Response;
  using Handled = httplib::Server::HandlerResponse;

  // Before the body is read. Browsers send this content type only where they were allowed to.
  server.set_pre_routing_handler([this](const Request& request, Response& response) {
    if (!authorized(request)) {
      response.set_header("WWW-Authenticate", "Bearer");
      refuse(response, 401, "the header 'Authorization: Bearer <token>' is missing or wrong");
    } else if (!is_served(request.method)) {
      refuse(response, 404, sentence_for(404, request));
    } else if (request.has_header("Transfer-Encoding") ||
               (request.method == "POST" && !request.has_header("Content-Length"))) {
      // Older versions of the library read such bodies without a limit.
      refuse(response, 411, "the length of the body must be announced, with 'Content-Length'");
    } else if (request.has_header("Content-Encoding")) {
      refuse(response, 415, "compressed bodies are not accepted");
    } else if (request.method == "POST" &&
               request.get_header_value("Content-Type").rfind("application/json", 0) != 0) {
      refuse(response, 415, "the body must be JSON, with 'Content-Type: application/json'");
    } else {
      return Handled::Unhandled;
    }
    return Handled::Handled;
  });
  server.set_error_handler([](const Request& request, Response& response) {
    if (response.body.empty())
      refuse(response, response.status, sentence_for(response.status, request));
  });
  server.set_logger([this](const Request& request, const Response& response) {
    metrics_.request(endpoint_of(request), response.status);
  });

  const char* json = "application/json";
  server.Post("/generate", [=, this](const Request& request, Response& response) {
    answer(response, json, [&] { return generate(request.body); });
  });
  server.Get("/patches", [=, this](const Request&, Response& response) {
    answer(response, json, [&] { return list_patches(); });
  });
  server.Post("/patches", [=, this](const Request& request, Response& response) {
    answer(response, json, [&] { return add_patch(request.body); }, 201);
  });
  server.Delete("/patches/([^/]{1,64})", [=, this](const Request& request, Response& response) {
    answer(response, json, [&] { return remove_patch(request.matches[1]); });
  });
  server.Get("/weights/([^/]{1,200})", [=, this](const Request& request, Response& response) {
    answer(response, "application/octet-stream", [&] { return weight(request.matches[1]); });
  });
  server.Get("/health", [=, this](const Request&, Response& response) {
    answer(response, json, [&] { return health(); });
  });
  server.Get("/metrics", [=, this](const Request&, Response& response) {
    answer(response, "text/plain; version=0.0.4", [&] {
      const auto wait = std::chrono::duration<double>(weights_.longest_wait()).count();
      return metrics_.text({{"hot_edit_patches", double(weights_.current()->patches.size())},
                            {"hot_edit_generations", double(gate_.present())},
                            {"hot_edit_longest_reader_wait_seconds", wait}});
    });
  });
}

bool Service::authorized(const httplib::Request& request) const {
  return options_.token.empty() || request.path == "/health" ||
         same(request.get_header_value("Authorization"), "Bearer " + options_.token);
}

std::string Service::generate(const std::string& body) {
  const RequestBody request(body, {"prompt", "max_tokens"});
  const std::string prompt = request.text("prompt");
  const int64_t limit = int64_t(options_.max_tokens);
  const int64_t max_tokens = request.whole("max_tokens", std::min<int64_t>(16, limit), 1, limit);

  // Bounds the work of the tokenizer; text has about four bytes a token.
  const size_t longest = 8 * model_.max_length();
  if (prompt.size() > longest)
    throw Refusal(400, "\"prompt\" has " + std::to_string(prompt.size()) +
                           " bytes, more than the limit of " + std::to_string(longest));
  std::vector<int64_t> tokens = tokenizer_.encode(prompt);
  if (tokens.empty()) throw Refusal(400, "\"prompt\" has no tokens");
  if (tokens.size() >= model_.max_length())
    throw Refusal(400, "\"prompt\" has " + std::to_string(tokens.size()) +
                           " tokens; with its answer it must not have more than " +
                           std::to_string(model_.max_length()));

  const Gate::Place place(gate_);
  thread_local const bool threads_set = (at::set_num_threads(int(options_.threads)), true);
  (void)threads_set;
  const auto begin = std::chrono::steady_clock::now();
  const LiveWeights::Pointer version = weights_.current();  // for the whole generation
  const Answer answer = model_.generate(version->weights, std::move(tokens), size_t(max_tokens));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  metrics_.generation.observe(seconds.count());
  return dump({{"text", tokenizer_.decode(answer.tokens)},
               {"tokens", answer.tokens},
               {"finish", answer.stopped ? "stop" : "length"},
               {"version", version->number},
               {"patches", ids(*version)}});
}

std::string Service::add_patch(const std::string& body) {
  const RequestBody request(body, {"file", "id"});
  return report(patches_.add(request.text("file"), request.optional_text("id")));
}

std::string Service::remove_patch(const std::string& id) { return report(patches_.remove(id)); }

std::string Service::report(const Change& change) {
  metrics_.prepare.observe(change.prepare_seconds);
  metrics_.store.observe(change.store_seconds);
  metrics_.pause.observe(change.pause_seconds);
  return dump({{"id", change.patch->id},
               {"modules", modules(*change.patch)},
               {"version", change.version->number},
               {"patches", ids(*change.version)},
               {"prepare_seconds", change.prepare_seconds},
               {"store_seconds", change.store_seconds},
               {"pause_seconds", change.pause_seconds}});
}

std::string Service::list_patches() const {
  const LiveWeights::Pointer version = weights_.current();
  Json list = Json::array();
  for (const auto& patch : version->patches) {
    list.push_back({{"id", patch->id},
                    {"created", patch->created},
                    {"base_model", patch->base_model},
                    {"modules", modules(*patch)},
                    {"requests", requests_of(*patch)}});
  }
  return dump({{"version", version->number}, {"patches", list}});
}

std::string Service::health() const {
  return dump({{"status", "ok"}, {"model", model_.name()}, {"model_digest", model_.digest()}});
}

std::string Service::weight(const std::string& module) const {
  const LiveWeights::Pointer version = weights_.current();
  for (size_t index = 0; index < version->weights.size(); ++index) {
    if (model_.weights()[index].module == module)
      return stableedit::serialize_safetensors({{{module + ".weight", version->weights[index]}},
                                                {{"version", std::to_string(version->number)}}});
  }
  throw Refusal(404, "there is no editable module " + module);
}

}  // namespace hot_edit
