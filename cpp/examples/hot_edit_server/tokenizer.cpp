#include "tokenizer.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace hot_edit {
namespace {

using Json = nlohmann::json;

// White space as Unicode has it. PCRE2's \s takes U+180E for a space, too, which it once was.
#define SPACE \
  R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})"

// The split of GPT-2 that "ByteLevel" means.
constexpr const char* kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^)" SPACE R"(\p{L}\p{N}]+|[)" SPACE
    R"(]+(?![^)" SPACE R"(])|[)" SPACE R"(]+)";

[[noreturn]] void unknown(const std::string& what) {
  throw std::runtime_error("tokenizer.json has " + what +
                           ", which this example does not know; it reads byte-level BPE");
}

// Byte-level vocabularies write each byte as a printable character: itself where it is one, else
// the next free one from U+0100 on.
std::array<char32_t, 256> byte_alphabet() {
  std::array<char32_t, 256> letters{};
  char32_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte > 32 && byte < 127) || (byte > 160 && byte < 173) || (byte > 173 && byte < 256);
    letters[byte] = printable ? char32_t(byte) : next++;
  }
  return letters;
}

// The letters of the alphabet need one or two bytes of UTF-8.
std::string utf8(char32_t letter) {
  if (letter < 0x80) return {char(letter)};
  return {char(0xC0 | letter >> 6), char(0x80 | (letter & 0x3F))};
}

}  // namespace

/// A compiled regular expression that cuts text into its matches and what lies between them.
class Tokenizer::Pattern {
 public:
  explicit Pattern(const std::string& expression) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expression.data()), expression.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
    if (!code_) unknown("the pattern '" + expression + "'");
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // only faster: may fail
  }

  std::vector<std::string_view> cut(std::string_view text) const {
    std::vector<std::string_view> pieces;
    const std::unique_ptr<pcre2_match_data, Free> match(
        pcre2_match_data_create_from_pattern(code_.get(), nullptr));
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    size_t end = 0;  // of the last piece
    while (end < text.size()) {
      const int found =
          pcre2_match(code_.get(), subject, text.size(), end, 0, match.get(), nullptr);
      if (found < 0 && found != PCRE2_ERROR_NOMATCH)
        throw std::runtime_error("the text cannot be split into words (PCRE2 error " +
                                 std::to_string(found) + ")");
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
      if (found < 0 || span[1] == span[0]) break;
      if (span[0] > end) pieces.push_back(text.substr(end, span[0] - end));
      pieces.push_back(text.substr(span[0], span[1] - span[0]));
      end = span[1];
    }
    if (end < text.size()) pieces.push_back(text.substr(end));
    return pieces;
  }

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
  };
  std::unique_ptr<pcre2_code, Free> code_;
};

Tokenizer::Tokenizer(const std::filesystem::path& file) {
  std::ifstream stream(file);
  if (!stream) throw std::runtime_error(file.string() + " cannot be read");
  try {
    const Json json = Json::parse(stream);
    const auto step = [&](const char* name) { return json.value(name, Json()); };
    if (!step("normalizer").is_null()) unknown("a normalizer");
    read_model(json.at("model"));
    read_added_tokens(json.at("added_tokens"));
    read_pre_tokenizer(json.at("pre_tokenizer"));
    read_post_processor(step("post_processor"));
  } catch (const Json::exception& error) {
    throw std::runtime_error(file.string() + " is no tokenizer.json: " + error.what());
  }
}

Tokenizer::~Tokenizer() = default;

void Tokenizer::read_model(const Json& model) {
  if (model.at("type") != "BPE") unknown("a model of type " + model.at("type").dump());
  if (model.value("ignore_merges", false)) unknown("ignore_merges");
  const auto ids = model.at("vocab").get<std::unordered_map<std::string, int32_t>>();
  const auto id_of = [&](const std::string& token) {
    const auto found = ids.find(token);
    if (found == ids.end()) throw std::runtime_error("tokenizer.json lacks the token " + token);
    return found->second;
  };

  std::unordered_map<std::string, char> byte_of;
  const auto alphabet = byte_alphabet();
  for (int byte = 0; byte < 256; ++byte) {
    byte_of[utf8(alphabet[byte])] = char(byte);
    // A vocabulary may lack bytes that UTF-8 never has.
    const auto found = ids.find(utf8(alphabet[byte]));
    byte_ids_[byte] = found == ids.end() ? -1 : found->second;
  }
  for (const auto& [token, id] : ids) {
    if (id < 0) throw std::runtime_error("tokenizer.json has a negative id");
    if (size_t(id) >= bytes_.size()) bytes_.resize(id + 1);
    for (size_t at = 0; at < token.size();) {
      const size_t size = (token[at] & 0x80) ? 2 : 1;
      const auto letter = byte_of.find(token.substr(at, size));
      if (letter != byte_of.end()) bytes_[id] += letter->second;
      at += size;
    }
  }

  int32_t rank = 0;
  for (const Json& merge : model.at("merges")) {
    std::string left, right;
    if (merge.is_string()) {  // older files: "left right"
      const std::string both = merge.get<std::string>();
      left = both.substr(0, both.find(' '));
      right = both.substr(left.size() + 1);
    } else {
      left = merge.at(0), right = merge.at(1);
    }
    merges_.emplace(Pair{id_of(left), id_of(right)}, Merge{rank++, id_of(left + right)});
  }
}

void Tokenizer::read_added_tokens(const Json& tokens) {
  for (const Json& token : tokens) {
    if (token.at("single_word") || token.at("lstrip") || token.at("rstrip"))
      unknown("an added token that takes its surroundings into account");
    const std::string content = token.at("content");
    const int64_t id = token.at("id");
    if (id < 0) throw std::runtime_error("tokenizer.json has a negative id");
    if (size_t(id) >= bytes_.size()) bytes_.resize(id + 1);
    bytes_[id] = token.at("special") ? "" : content;
    if (!content.empty()) added_.emplace_back(content, id);
  }
  std::ranges::stable_sort(
      added_, [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
}

void Tokenizer::read_pre_tokenizer(const Json& step) {
  const std::string type = step.at("type");
  if (type == "Sequence") {
    for (const Json& part : step.at("pretokenizers")) read_pre_tokenizer(part);
  } else if (type == "Digits") {
    splits_.emplace_back(step.at("individual_digits") ? R"(\p{N})" : R"(\p{N}+)");
  } else if (type == "ByteLevel") {
    if (step.at("add_prefix_space")) unknown("add_prefix_space");
    if (step.value("use_regex", true)) splits_.emplace_back(kByteLevelPattern);
  } else {
    unknown("the pre-tokenizer " + type);
  }
}

void Tokenizer::read_post_processor(const Json& step) {
  if (step.is_null() || step.at("type") == "ByteLevel") return;  // ByteLevel only moves offsets
  if (step.at("type") != "TemplateProcessing")
    unknown("a post-processor of type " + step.at("type").dump());
  for (const Json& part : step.at("single")) {
    if (part.contains("Sequence")) break;  // what closes a text has no place in a prompt
    const std::string name = part.at("SpecialToken").at("id");
    for (const Json& id : step.at("special_tokens").at(name).at("ids")) opening_.push_back(id);
  }
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int64_t> ids = opening_;
  size_t begin = 0;  // of the text that is not encoded yet
  for (size_t at = 0; at < text.size(); ++at) {
    const auto token = std::ranges::find_if(added_, [&](const auto& candidate) {
      return text.substr(at).starts_with(candidate.first);
    });
    if (token == added_.end()) continue;
    encode_piece(text.substr(begin, at - begin), ids);
    ids.push_back(token->second);
    begin = at + token->first.size();
    at = begin - 1;
  }
  encode_piece(text.substr(begin), ids);
  return ids;
}

void Tokenizer::encode_piece(std::string_view text, std::vector<int64_t>& ids) const {
  std::vector<std::string_view> pieces{text};
  for (const Pattern& pattern : splits_) {
    std::vector<std::string_view> finer;
    for (const std::string_view piece : pieces) {
      const auto parts = pattern.cut(piece);
      finer.insert(finer.end(), parts.begin(), parts.end());
    }
    pieces = std::move(finer);
  }
  for (const std::string_view word : pieces) encode_word(word, ids);
}

// Merges the neighbours of the lowest rank until none are left to merge.
void Tokenizer::encode_word(std::string_view word, std::vector<int64_t>& ids) const {
  std::vector<int32_t> symbols;
  for (const char byte : word) {
    const int32_t id = byte_ids_[uint8_t(byte)];
    if (id >= 0) symbols.push_back(id);  // the Python tokenizer drops what it lacks, too
  }
  constexpr Merge kNone{std::numeric_limits<int32_t>::max(), -1};
  const auto merge_at = [&](size_t at) {
    if (at + 1 >= symbols.size()) return kNone;
    const auto found = merges_.find({symbols[at], symbols[at + 1]});
    return found == merges_.end() ? kNone : found->second;
  };
  std::vector<Merge> merges;  // of each symbol with the next
  for (size_t at = 0; at < symbols.size(); ++at) merges.push_back(merge_at(at));
  while (!symbols.empty()) {
    const auto best = std::ranges::min_element(
        merges, [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
    if (best->merged < 0) break;
    const auto at = static_cast<size_t>(best - merges.begin());
    symbols[at] = best->merged;
    symbols.erase(std::next(symbols.begin(), best - merges.begin() + 1));
    merges.erase(best + 1);
    merges[at] = merge_at(at);
    if (at > 0) merges[at - 1] = merge_at(at - 1);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  std::string text;
  for (const int64_t id : ids) {
    if (id >= 0 && size_t(id) < bytes_.size()) text += bytes_[id];
  }
  return text;
}

}  // namespace hot_edit
