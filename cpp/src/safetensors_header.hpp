#pragma once

// The JSON header of a safetensors file, on its own so that one source sees the JSON library.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace stableedit {

/// Where the bytes of a tensor are, counted from the end of the header.
struct TensorEntry {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  uint64_t begin;
  uint64_t end;
};

struct SafeTensorsHeader {
  std::vector<TensorEntry> entries;  // in the order of their bytes, without holes
  std::map<std::string, std::string> metadata;
};

constexpr uint64_t kMaxHeader = 100'000'000;  // bytes; the limit of the reference implementation

/// \param data_size how many bytes follow the header
/// \throws ValueError that begins with `source`.
SafeTensorsHeader parse_header(std::string_view text, uint64_t data_size,
                               const std::string& source);

/// Entries in the order in which the reference implementation lays them out, with their offsets.
std::vector<TensorEntry> lay_out(const std::map<std::string, at::Tensor>& tensors);

/// The header's JSON, padded with spaces to a multiple of 8.
std::string write_header(const SafeTensorsHeader& header);

/// The format's name of a dtype, e.g. "F32". \throws ValueError where it has none.
std::string_view dtype_name(at::ScalarType dtype);

}  // namespace stableedit
