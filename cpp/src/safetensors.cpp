#include "stableedit/safetensors.hpp"

#include <ATen/ops/empty.h>

#include <bit>
#include <cstring>
#include <functional>

#include "checks.hpp"
#include "checksum.hpp"
#include "files.hpp"
#include "safetensors_header.hpp"

namespace stableedit {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors is little-endian");

constexpr const char* kChecksum = "stableedit.checksum";
constexpr uint64_t kPrefix = 8;  // bytes that hold the length of the header

/// Copies `size` bytes from `offset` of the source to `data`.
using Read = std::function<void(void* data, uint64_t size, uint64_t offset)>;

SafeTensors read_content(const Read& read, uint64_t size, const std::string& source) {
  TORCH_CHECK_VALUE(size >= kPrefix, source, " is not a safetensors file: it has only ", size,
                    " bytes");
  uint64_t length = 0;
  read(&length, kPrefix, 0);
  TORCH_CHECK_VALUE(length <= kMaxHeader && length <= size - kPrefix, source,
                    " is not a safetensors file, or cut off: it announces a header of ", length,
                    " bytes, but has ", size, " in all (a header holds at most ", kMaxHeader, ")");
  std::string text(length, '\0');
  read(text.data(), length, kPrefix);
  SafeTensorsHeader header = parse_header(text, size - kPrefix - length, source);

  SafeTensors content{.metadata = std::move(header.metadata)};
  for (const TensorEntry& entry : header.entries) {
    const at::Tensor tensor = at::empty(entry.shape, entry.dtype);
    if (tensor.numel() > 0) {
      read(tensor.mutable_data_ptr(), tensor.nbytes(), kPrefix + length + entry.begin);
    }
    // A bool with another bit pattern is undefined behaviour in C++.
    TORCH_CHECK_VALUE(entry.dtype != at::kBool || tensor.view(at::kByte).le(1).all().item<bool>(),
                      source, ": tensor '", shown(entry.name),
                      "' is of booleans, but holds bytes other than 0 and 1");
    content.tensors.emplace(entry.name, tensor);
  }
  if (const auto stored = content.metadata.extract(kChecksum)) {
    const std::string actual = checksum(content);
    TORCH_CHECK_VALUE(stored.mapped() == actual, source, " is damaged: its checksum is ", actual,
                      ", but it was written with ", shown(stored.mapped()));
    content.checksummed = true;
  }
  return content;
}

void write_content(SafeTensors content, const Write& write) {
  for (auto& [name, tensor] : content.tensors) {
    TORCH_CHECK_VALUE(tensor.defined() && tensor.layout() == at::kStrided, "tensor '", name,
                      "' must be dense to be written");
    dtype_name(tensor.scalar_type());  // throws for one that the format lacks
    tensor = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg();
  }
  content.metadata.erase(kChecksum);
  content.metadata[kChecksum] = checksum(content);

  const SafeTensorsHeader header{lay_out(content.tensors), std::move(content.metadata)};
  const std::string text = write_header(header);
  const uint64_t length = text.size();
  write({reinterpret_cast<const char*>(&length), kPrefix});
  write(text);
  for (const TensorEntry& entry : header.entries) {
    const at::Tensor& tensor = content.tensors.at(entry.name);
    if (tensor.numel() > 0) {
      write({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()});
    }
  }
}

}  // namespace

SafeTensors parse_safetensors(std::string_view bytes, const std::string& source) {
  const Read read = [&](void* data, uint64_t size, uint64_t offset) {
    std::memcpy(data, bytes.data() + offset, size);
  };
  return read_content(read, bytes.size(), source);
}

std::string serialize_safetensors(const SafeTensors& content) {
  std::string bytes;
  write_content(content, [&](std::string_view piece) { bytes.append(piece); });
  return bytes;
}

SafeTensors load_safetensors(const std::filesystem::path& path) {
  const InputFile file(path);
  const Read read = [&](void* data, uint64_t size, uint64_t offset) {
    file.read(data, size, offset);
  };
  return read_content(read, file.size(), path.string());
}

void save_safetensors(const std::filesystem::path& path, const SafeTensors& content) {
  write_atomically(path, [&](const Write& write) { write_content(content, write); });
}

}  // namespace stableedit
