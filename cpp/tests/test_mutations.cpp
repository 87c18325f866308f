// Broken safetensors files: each mutation of a good one is read or refused with a sentence.
// STABLEEDIT_MUTATIONS says how many (`make sanitize` asks for 100,000); number i is always the
// same.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "../fuzz/check_reader.hpp"

namespace stableedit {
namespace {

constexpr size_t kPrefix = 8;  // bytes that hold the length of the header

std::vector<std::string> read_corpus() {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(STABLEEDIT_CORPUS)) {
    paths.push_back(entry.path());
  }
  std::ranges::sort(paths);
  std::vector<std::string> corpus;
  for (const auto& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

class Mutator {
 public:
  Mutator(const std::vector<std::string>& corpus, uint64_t number)
      : corpus_(corpus), random_(number) {}

  std::string mutate() {
    std::string bytes = pick(corpus_);
    for (uint64_t more = below(4) + 1; more > 0; --more) mutate_once(bytes);
    return bytes;
  }

 private:
  uint64_t below(uint64_t end) { return random_() % end; }

  template <typename Container>
  const Container::value_type& pick(const Container& from) {
    return from[below(std::size(from))];
  }

  void mutate_once(std::string& bytes) {
    if (bytes.empty()) bytes = pick(corpus_);
    const size_t at = below(bytes.size());
    switch (below(8)) {
      case 0:  // a bit
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:  // a byte
        bytes[at] = pick(std::array{'\0', '\x01', '\x7f', '\xff', '"', '\\', '{', ']', '-', '\n'});
        break;
      case 2:  // the end
        bytes.resize(at);
        break;
      case 3:  // more
        bytes.append(1 + below(16), static_cast<char>(below(256)));
        break;
      case 4:  // the length of the header
        announce(bytes, below(2) != 0 ? below(2 * bytes.size()) : random_() >> below(64));
        break;
      case 5: {  // a piece of another file
        const std::string& other = pick(corpus_);
        const size_t from = below(other.size());
        bytes.insert(at, other, from, below(64));
        break;
      }
      default:  // the JSON, with a length that fits, so that the reader looks further
        mutate_header(bytes);
    }
  }

  static void announce(std::string& bytes, uint64_t length) {
    if (bytes.size() >= kPrefix) std::memcpy(bytes.data(), &length, kPrefix);
  }

  // Replaces, removes or doubles one token: a string, a number or a bracket.
  void mutate_header(std::string& bytes) {
    uint64_t length = 0;
    if (bytes.size() < kPrefix) return;
    std::memcpy(&length, bytes.data(), kPrefix);
    if (length > bytes.size() - kPrefix) return;
    std::vector<std::string> tokens = tokenize(bytes.substr(kPrefix, length));
    if (tokens.empty()) return;
    const size_t at = below(tokens.size());
    switch (below(4)) {
      case 0:
        tokens[at] = pick(kTokens);
        break;
      case 1:
        tokens[at] = pick(tokens);
        break;
      case 2:
        tokens[at].clear();
        break;
      default:
        tokens.insert(tokens.begin() + static_cast<std::ptrdiff_t>(at), pick(tokens));
    }
    std::string header;
    for (const std::string& token : tokens) header += token;
    bytes.replace(kPrefix, length, header);
    announce(bytes, header.size());
  }

  static std::vector<std::string> tokenize(const std::string& json) {
    std::vector<std::string> tokens;
    for (size_t at = 0; at < json.size();) {
      size_t end = at + 1;
      if (json[at] == '"') {
        end = std::min(json.find('"', end), json.size() - 1) + 1;
      } else if (std::isdigit(static_cast<unsigned char>(json[at])) != 0) {
        end = std::min(json.find_first_not_of("0123456789", at), json.size());
      }
      tokens.push_back(json.substr(at, end - at));
      at = end;
    }
    return tokens;
  }

  static const std::vector<std::string> kTokens;

  const std::vector<std::string>& corpus_;
  std::mt19937_64 random_;
};

const std::vector<std::string> Mutator::kTokens = {"0",
                                                   "1",
                                                   "-1",
                                                   "-0",
                                                   "1.5",
                                                   "1e3",
                                                   "1e999",
                                                   "4294967296",
                                                   "9223372036854775807",
                                                   "9223372036854775808",
                                                   "18446744073709551615",
                                                   "18446744073709551616",
                                                   "null",
                                                   "true",
                                                   "{}",
                                                   "[]",
                                                   "[[]]",
                                                   "{\"a\":{\"b\":{}}}",
                                                   "\"\"",
                                                   "\"a\\u0000b\"",
                                                   "\"line\\nbreak\"",
                                                   "\"\xff\"",
                                                   "\"\\ud800\"",
                                                   "\"BOOL\"",
                                                   "\"F64\"",
                                                   "\"F8_E4M3\"",
                                                   "\"I128\"",
                                                   "\"__metadata__\"",
                                                   "\"dtype\"",
                                                   "\"stableedit.checksum\"",
                                                   "\"format\"",
                                                   "\"version\"",
                                                   "\"" + std::string(5000, 'x') + "\"",
                                                   std::string(1000, '['),
                                                   std::string(1000, '{')};

TEST(Mutations, AreReadOrRefusedWithASentence) {
  const std::vector<std::string> corpus = read_corpus();
  ASSERT_FALSE(corpus.empty());
  // NOLINTNEXTLINE(concurrency-mt-unsafe): the test has one thread
  const char* wanted = std::getenv("STABLEEDIT_MUTATIONS");
  const uint64_t count = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 5000;
  uint64_t refused = 0;
  for (uint64_t number = 0; number < count; ++number) {
    const std::string bytes = Mutator(corpus, number).mutate();
    ASSERT_EQ(reader::check_reader(bytes), "") << "mutation " << number;
    try {
      parse_safetensors(bytes);
    } catch (const c10::ValueError&) {
      ++refused;
    }
  }
  // Neither all nor nothing, or the mutations are not what they should be.
  EXPECT_GT(refused, count / 2);
  EXPECT_LT(refused, count - count / 100);
  RecordProperty("mutations", std::to_string(count));
  RecordProperty("refused", std::to_string(refused));
}

TEST(Mutations, EverySeedOfTheCorpusIsTreatedRight) {
  for (const std::string& bytes : read_corpus()) EXPECT_EQ(reader::check_reader(bytes), "");
}

}  // namespace
}  // namespace stableedit
