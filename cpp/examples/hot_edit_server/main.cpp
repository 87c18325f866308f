// A server for a language model that is edited while it serves. README.md shows how to use it.

#include <c10/util/Exception.h>
#include <getopt.h>
#include <httplib.h>
#include <pthread.h>
#include <signal.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>

#include "http.hpp"

namespace {

constexpr const char* kHelp =
    R"(usage: hot_edit_server --model DIR --patches DIR --state DIR [options]

Serves a language model over HTTP and applies patches to it while it serves.

  --model DIR        what export_model.py wrote
  --patches DIR      the only directory that patch files are taken from
  --state DIR        keeps the applied patches; made where there is none
  --host ADDRESS     default 127.0.0.1; any other needs --token-file
  --port N           default 8080; 0 takes any that is free
  --token-file FILE  requests must bring this token: Authorization: Bearer <token>
  --concurrency N    generations that run side by side (default: 2)
  --threads N        CPU threads of each (default 1)
  --queue N          generations that may wait (default 64)
  --max-tokens N     longest answer (default 64)
  --max-patch-mb N   largest patch file (default 256)
  --help

example:
  hot_edit_server --model exported --patches patches --state state &
  curl localhost:8080/generate -H 'Content-Type: application/json' -d '{"prompt": "The capital of Australia is"}'
  curl localhost:8080/patches -H 'Content-Type: application/json' -d '{"file": "canberra.safetensors"}'
  curl -X DELETE localhost:8080/patches/canberra
)";

struct Options {
  std::string model, patches, state, token_file;
  std::string host = "127.0.0.1";
  size_t port = 8080;
  size_t max_patch_mb = 256;
  hot_edit::ServiceOptions service{.concurrency = 2};
};

size_t number(const char* name, const char* text, size_t smallest, size_t largest) {
  size_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < smallest || value > largest)
    throw std::invalid_argument(std::string("--") + name + " " + text + " must be a number from " +
                                std::to_string(smallest) + " to " + std::to_string(largest));
  return value;
}

Options parse(int argc, char** argv) {
  enum {
    kModel,
    kPatches,
    kState,
    kHost,
    kPort,
    kToken,
    kConcurrency,
    kThreads,
    kQueue,
    kTokens,
    kPatchMb,
    kHelpFlag
  };
  const option known[] = {{"model", 1, nullptr, kModel},
                          {"patches", 1, nullptr, kPatches},
                          {"state", 1, nullptr, kState},
                          {"host", 1, nullptr, kHost},
                          {"port", 1, nullptr, kPort},
                          {"token-file", 1, nullptr, kToken},
                          {"concurrency", 1, nullptr, kConcurrency},
                          {"threads", 1, nullptr, kThreads},
                          {"queue", 1, nullptr, kQueue},
                          {"max-tokens", 1, nullptr, kTokens},
                          {"max-patch-mb", 1, nullptr, kPatchMb},
                          {"help", 0, nullptr, kHelpFlag},
                          {}};
  Options options;
  opterr = 0;
  // No other thread has begun. NOLINTBEGIN(concurrency-mt-unsafe)
  for (int index = 0, flag; (flag = getopt_long(argc, argv, "", known, &index)) != -1;) {
    const auto count = [&](size_t smallest, size_t largest) {
      return number(known[index].name, optarg, smallest, largest);
    };
    switch (flag) {
      case kModel:
        options.model = optarg;
        break;
      case kPatches:
        options.patches = optarg;
        break;
      case kState:
        options.state = optarg;
        break;
      case kHost:
        options.host = optarg;
        break;
      case kPort:
        options.port = count(0, 65535);
        break;
      case kToken:
        options.token_file = optarg;
        break;
      case kConcurrency:
        options.service.concurrency = count(1, 1024);
        break;
      case kThreads:
        options.service.threads = count(1, 1024);
        break;
      case kQueue:
        options.service.queue = count(0, 4096);
        break;
      case kTokens:
        options.service.max_tokens = count(1, 1 << 20);
        break;
      case kPatchMb:
        options.max_patch_mb = count(1, 1 << 20);
        break;
      case kHelpFlag:
        std::cout << kHelp;
        std::exit(0);
      default:
        throw std::invalid_argument(std::string(argv[optind - 1]) +
                                    " is unknown or lacks its value; see --help");
    }
  }
  // NOLINTEND(concurrency-mt-unsafe)
  if (optind < argc)
    throw std::invalid_argument(std::string(argv[optind]) + " is unexpected; see --help");
  if (options.model.empty() || options.patches.empty() || options.state.empty())
    throw std::invalid_argument("--model, --patches and --state are needed; see --help");
  if (options.host != "127.0.0.1" && options.host != "localhost" && options.host != "::1" &&
      options.token_file.empty())
    throw std::invalid_argument("--host " + options.host +
                                " lets other machines in; give a --token-file as well");
  return options;
}

std::string read_token(const std::string& file) {
  std::ifstream stream(file);
  std::string token;
  if (!(stream >> token) || token.size() < 16)
    throw std::invalid_argument("--token-file " + file +
                                " must hold a token of at least 16 characters");
  return token;
}

sigset_t ending_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  return signals;
}

void serve(Options options) {
  using namespace hot_edit;
  if (!options.token_file.empty()) options.service.token = read_token(options.token_file);
  const std::filesystem::path directory = options.model;
  const Model model(directory, options.service.concurrency);
  const Tokenizer tokenizer(directory / "tokenizer.json");
  LiveWeights weights(model);
  Patches patches(weights, options.patches, options.state, options.max_patch_mb << 20);
  Service service(model, tokenizer, weights, patches, options.service);

  httplib::Server server;
  service.install(server);
  // A thread for every generation that runs or waits, and some for everybody else. One request a
  // connection: an idle client then holds no thread, and a body that was refused unread is not
  // taken for the next request.
  const size_t threads = options.service.concurrency + options.service.queue + 8;
  server.new_task_queue = [=] { return new httplib::ThreadPool(threads); };
  server.set_keep_alive_max_count(1);
  server.set_tcp_nodelay(true);
  // The library's own options would let a second server share the port of the first.
  server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  });
  server.set_payload_max_length(1 << 16);

  const int port = options.port == 0 ? server.bind_to_any_port(options.host)
                   : server.bind_to_port(options.host, int(options.port)) ? int(options.port)
                                                                          : -1;
  if (port < 0)
    throw std::runtime_error("cannot listen on " + options.host + " port " +
                             std::to_string(options.port) + "; is it in use?");
  std::cout << model.name() << " on http://" << options.host << ":" << port << ", "
            << weights.current()->patches.size() << " patches\n"
            << std::flush;

  std::thread waiter([&server] {
    const sigset_t ends = ending_signals();
    int signal = 0;
    sigwait(&ends, &signal);
    server.stop();
  });
  server.listen_after_bind();  // requests that have begun are answered before it returns
  // Where something else ended the listening; the thread waits for the signal, which ends nothing.
  // NOLINTNEXTLINE(bugprone-bad-signal-to-kill-thread)
  pthread_kill(waiter.native_handle(), SIGTERM);
  waiter.join();
}

}  // namespace

int main(int argc, char** argv) {
  // Only the thread that waits for them gets these signals; threads inherit the mask.
  const sigset_t blocked = ending_signals();
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  signal(SIGPIPE, SIG_IGN);
  std::string reason;
  try {
    serve(parse(argc, argv));
    return 0;
  } catch (const c10::Error& error) {
    reason = error.what_without_backtrace();
  } catch (const std::exception& error) {
    reason = error.what();
  }
  std::cerr << "hot_edit_server: error: " << reason << "\n";
  return 2;
}
