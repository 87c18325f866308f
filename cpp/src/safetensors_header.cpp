#include "safetensors_header.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <ranges>
#include <set>
#include <utility>

#include "checks.hpp"

namespace stableedit {
namespace {

using Json = nlohmann::json;

// In the order of the reference implementation, which lays tensors out from the last to the first.
constexpr std::pair<at::ScalarType, std::string_view> kDtypes[] = {
    {at::kBool, "BOOL"},
    {at::kByte, "U8"},
    {at::kChar, "I8"},
    {at::ScalarType::Float8_e5m2, "F8_E5M2"},
    {at::ScalarType::Float8_e4m3fn, "F8_E4M3"},
    {at::kShort, "I16"},
    {at::ScalarType::UInt16, "U16"},
    {at::kHalf, "F16"},
    {at::kBFloat16, "BF16"},
    {at::kInt, "I32"},
    {at::ScalarType::UInt32, "U32"},
    {at::kFloat, "F32"},
    {at::ScalarType::ComplexFloat, "C64"},
    {at::kDouble, "F64"},
    {at::kLong, "I64"},
    {at::ScalarType::UInt64, "U64"},
};

constexpr const char* kMetadata = "__metadata__";
constexpr size_t kMaxDims = 64;
constexpr uint64_t kMaxBytes = std::numeric_limits<int64_t>::max();

// Refuses what the parser would let pass: members that occur twice, and nesting that no header has.
Json parse_json(std::string_view text, const std::string& source) {
  // The parser takes a zero byte for the end of the text.
  TORCH_CHECK_VALUE(text.find('\0') == std::string_view::npos, source,
                    " is not a safetensors file: its header is not valid JSON");
  std::vector<std::set<std::string>> members;
  const auto check = [&](int depth, Json::parse_event_t event, Json& value) {
    if (event == Json::parse_event_t::object_start) {
      TORCH_CHECK_VALUE(depth < 2, source, " is not a safetensors file: its header is nested");
      members.emplace_back();
    } else if (event == Json::parse_event_t::array_start) {
      TORCH_CHECK_VALUE(depth < 3, source, " is not a safetensors file: its header is nested");
    } else if (event == Json::parse_event_t::object_end) {
      members.pop_back();
    } else if (event == Json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      TORCH_CHECK_VALUE(members.back().insert(name).second, source,
                        " is not a safetensors file: its header has two members '", shown(name),
                        "'");
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), check);
  } catch (const Json::exception&) {
    TORCH_CHECK_VALUE(false, source, " is not a safetensors file: its header is not valid JSON");
  }
}

int64_t whole_number(const Json& value, const std::string& where) {
  const bool fits = value.is_number_unsigned() && value.get<uint64_t>() <= kMaxBytes;
  TORCH_CHECK_VALUE(fits, where, " has a size or an offset that is not a whole number");
  return value.get<int64_t>();
}

TensorEntry parse_entry(const std::string& name, const Json& value, const std::string& source) {
  const std::string where = source + ": tensor '" + shown(name) + "'";
  const bool complete = value.is_object() && value.size() == 3 && value.contains("dtype") &&
                        value["dtype"].is_string() && value.contains("shape") &&
                        value["shape"].is_array() && value.contains("data_offsets") &&
                        value["data_offsets"].is_array() && value["data_offsets"].size() == 2;
  TORCH_CHECK_VALUE(complete, where, " must have dtype, shape and two data_offsets, nothing else");

  TensorEntry entry{.name = name};
  const auto& dtype = value["dtype"].get_ref<const std::string&>();
  const auto* known = std::ranges::find_if(kDtypes, [&](auto& d) { return d.second == dtype; });
  TORCH_CHECK_VALUE(known != std::end(kDtypes), where, " has dtype '", shown(dtype),
                    "', which is not supported");
  entry.dtype = known->first;

  TORCH_CHECK_VALUE(value["shape"].size() <= kMaxDims, where, " has ", value["shape"].size(),
                    " dimensions; torch has at most ", kMaxDims);
  uint64_t bytes = c10::elementSize(entry.dtype);
  bool empty = false;
  for (const Json& json_size : value["shape"]) {
    const int64_t size = whole_number(json_size, where);
    entry.shape.push_back(size);
    empty = empty || size == 0;
    // Strides must fit, too, also those of an empty tensor.
    const bool overflow =
        __builtin_mul_overflow(bytes, static_cast<uint64_t>(std::max<int64_t>(size, 1)), &bytes);
    TORCH_CHECK_VALUE(!overflow && bytes <= kMaxBytes, where, " is larger than any memory");
  }
  if (empty) bytes = 0;
  entry.begin = whole_number(value["data_offsets"][0], where);
  entry.end = whole_number(value["data_offsets"][1], where);
  TORCH_CHECK_VALUE(entry.begin <= entry.end && entry.end - entry.begin == bytes, where, " needs ",
                    bytes, " bytes by its dtype and shape, but its data_offsets are ", entry.begin,
                    " and ", entry.end);
  return entry;
}

}  // namespace

SafeTensorsHeader parse_header(std::string_view text, uint64_t data_size,
                               const std::string& source) {
  const Json json = parse_json(text, source);
  TORCH_CHECK_VALUE(json.is_object(), source,
                    " is not a safetensors file: its header is no object");
  SafeTensorsHeader header;
  for (const auto& [name, value] : json.items()) {
    if (name != kMetadata) {
      header.entries.push_back(parse_entry(name, value, source));
      continue;
    }
    TORCH_CHECK_VALUE(value.is_object(), source, ": __metadata__ must map strings to strings");
    for (const auto& [key, text_value] : value.items()) {
      TORCH_CHECK_VALUE(text_value.is_string(), source,
                        ": __metadata__ must map strings to strings");
      header.metadata[key] = text_value.get<std::string>();
    }
  }
  std::ranges::stable_sort(header.entries, [](auto& a, auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t end = 0;
  for (const TensorEntry& entry : header.entries) {
    TORCH_CHECK_VALUE(entry.begin == end, source, ": the bytes of tensor '", shown(entry.name),
                      "' must begin at ", end, ", where those before it end, not at ", entry.begin);
    end = entry.end;
  }
  TORCH_CHECK_VALUE(end == data_size, source, " has ", data_size,
                    " bytes of tensors, but its header describes ", end);
  return header;
}

std::vector<TensorEntry> lay_out(const std::map<std::string, at::Tensor>& tensors) {
  std::vector<TensorEntry> entries;
  for (const auto& [dtype, _] : std::views::reverse(kDtypes)) {
    for (const auto& [name, tensor] : tensors) {
      if (tensor.scalar_type() != dtype) continue;
      const uint64_t begin = entries.empty() ? 0 : entries.back().end;
      entries.push_back({name, dtype, tensor.sizes().vec(), begin, begin + tensor.nbytes()});
    }
  }
  return entries;
}

std::string write_header(const SafeTensorsHeader& header) {
  // Members one by one: an ordered JSON object would search all of them for each.
  using Member = nlohmann::ordered_json;
  std::string text = "{";
  const auto add = [&](const std::string& name, const Member& value) {
    if (text.size() > 1) text += ",";
    text += Member(name).dump() + ":" + value.dump();
  };
  try {
    if (!header.metadata.empty()) add(kMetadata, header.metadata);
    for (const TensorEntry& entry : header.entries) {
      TORCH_CHECK_VALUE(entry.name != kMetadata, "a tensor cannot be named ", kMetadata);
      add(entry.name, {{"dtype", dtype_name(entry.dtype)},
                       {"shape", entry.shape},
                       {"data_offsets", {entry.begin, entry.end}}});
    }
  } catch (const Member::type_error&) {
    TORCH_CHECK_VALUE(false, "names and metadata of tensors must be UTF-8 text");
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  TORCH_CHECK_VALUE(text.size() <= kMaxHeader, "names, shapes and metadata take ", text.size(),
                    " bytes, but a safetensors header holds at most ", kMaxHeader);
  return text;
}

std::string_view dtype_name(at::ScalarType dtype) {
  for (const auto& [known, name] : kDtypes) {
    if (known == dtype) return name;
  }
  TORCH_CHECK_VALUE(false, "safetensors cannot hold a tensor of dtype ", dtype);
}

}  // namespace stableedit
