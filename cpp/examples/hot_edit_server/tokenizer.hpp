#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace hot_edit {

/// Byte-level byte-pair encoding (GPT-2, SmolLM2), from the tokenizer.json of Hugging Face.
///
/// Gives the ids that the Python tokenizer gives. What a file asks for beyond this (normalisers,
/// other pre-tokenizers) is refused, not ignored.
/// Concurrency: immutable after construction; any number of threads may use one object.
class Tokenizer {
 public:
  /// \throws std::runtime_error for a file that cannot be read or that asks for something unknown.
  explicit Tokenizer(const std::filesystem::path& file);
  ~Tokenizer();

  /// \param text valid UTF-8. With the opening tokens that the file prescribes, no closing ones.
  std::vector<int64_t> encode(std::string_view text) const;

  /// Special tokens are left out. A token may end inside a character, so may the result.
  std::string decode(const std::vector<int64_t>& ids) const;

 private:
  class Pattern;
  using Pair = std::pair<int32_t, int32_t>;
  struct PairHash {
    size_t operator()(const Pair& pair) const {
      return std::hash<uint64_t>()(uint64_t(uint32_t(pair.first)) << 32 | uint32_t(pair.second));
    }
  };
  struct Merge {
    int32_t rank;
    int32_t merged;
  };

  void read_model(const nlohmann::json& model);
  void read_pre_tokenizer(const nlohmann::json& step);
  void read_post_processor(const nlohmann::json& step);
  void read_added_tokens(const nlohmann::json& tokens);
  void encode_piece(std::string_view text, std::vector<int64_t>& ids) const;
  void encode_word(std::string_view word, std::vector<int64_t>& ids) const;

  std::vector<int64_t> opening_;
  std::vector<std::pair<std::string, int64_t>> added_;  // longest first; found before all else
  std::vector<Pattern> splits_;                         // applied one after the other
  std::array<int32_t, 256> byte_ids_{};
  std::unordered_map<Pair, Merge, PairHash> merges_;
  std::vector<std::string> bytes_;  // of each id; empty for special tokens
};

}  // namespace hot_edit
