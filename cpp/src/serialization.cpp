#include "stableedit/serialization.hpp"

#include <charconv>
#include <utility>

#include "checks.hpp"

namespace stableedit {
namespace {

/// A kind of file, and the version that is written; earlier ones are read.
struct Format {
  const char* name;
  int version;
};
constexpr Format kState{"stableedit-state", 2};  // 2: a whitener knows its mean square
constexpr Format kPatch{"stableedit-patch", 1};

void check_format(const SafeTensors& file, const std::string& source, const Format& format) {
  const auto& metadata = file.metadata;
  const auto found = metadata.find("format");
  TORCH_CHECK_VALUE(
      found != metadata.end() && found->second == format.name, source, " is not a ", format.name,
      " file: its metadata has ",
      found == metadata.end() ? "no format" : "format '" + shown(found->second) + "'");
  const auto field = metadata.find("version");
  const std::string text = field == metadata.end() ? "" : field->second;
  int version = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), version);
  TORCH_CHECK_VALUE(!text.empty() && parsed.ptr == text.data() + text.size() && version >= 1,
                    source, " has no valid format version (it is '", shown(text), "')");
  TORCH_CHECK_VALUE(version <= format.version, source, " is a ", format.name, " file of version ",
                    version, ", but this stableedit reads versions up to ", format.version,
                    "; use a newer stableedit");
  TORCH_CHECK_VALUE(file.checksummed, source, " has no checksum, so damage would go unnoticed; ",
                    "write it with stableedit");
}

/// "a/b/c" -> ("a/b", "c")
std::pair<std::string, std::string> split(const std::string& name, const std::string& source) {
  const size_t slash = name.rfind('/');
  TORCH_CHECK_VALUE(slash != std::string::npos, source, " has a tensor '", shown(name),
                    "', which belongs to nothing; expected names like '<module>/<field>'");
  return {name.substr(0, slash), name.substr(slash + 1)};
}

std::string value_or_empty(const std::map<std::string, std::string>& metadata,
                           const std::string& key) {
  const auto found = metadata.find(key);
  return found == metadata.end() ? "" : found->second;
}

// A matrix of a patch, with everything checked that could fail once weights are being changed.
at::Tensor matrix(const StateDict& fields, const std::string& field, const std::string& where) {
  const at::Tensor& tensor = fields.at(field);
  const std::string name = where + "/" + field;
  const at::ScalarType dtype = tensor.scalar_type();
  const bool is_float =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
  TORCH_CHECK_VALUE(tensor.dim() == 2 && is_float, name,
                    " must be a float32, float64, float16 or bfloat16 matrix, but it is ", dtype,
                    " of shape ", tensor.sizes());
  check_finite(tensor, name.c_str());
  return tensor;
}

WeightChange read_change(const std::string& module, const StateDict& fields,
                         const std::map<std::string, std::string>& metadata,
                         const std::string& source) {
  const std::string where = source + ": " + shown(module);
  const std::string layout = value_or_empty(metadata, module + "/layout");
  TORCH_CHECK_VALUE(layout == "linear" || layout == "conv1d", where,
                    " must have the layout 'linear' or 'conv1d' in the metadata, not '",
                    shown(layout), "'");
  const WeightLayout parsed = layout == "linear" ? WeightLayout::kLinear : WeightLayout::kConv1D;
  if (fields.size() == 1 && fields.contains("delta")) {
    return {matrix(fields, "delta", where), parsed};
  }
  TORCH_CHECK_VALUE(fields.size() == 2 && fields.contains("left") && fields.contains("right"),
                    where, " must have the tensors 'left' and 'right', or 'delta' alone");
  const at::Tensor left = matrix(fields, "left", where);
  const at::Tensor right = matrix(fields, "right", where);
  TORCH_CHECK_VALUE(left.size(1) == right.size(0) && left.scalar_type() == right.scalar_type(),
                    where, " must have left [v, r] and right [r, k] of one dtype, but they are ",
                    left.scalar_type(), " ", left.sizes(), " and ", right.scalar_type(), " ",
                    right.sizes());
  return {LowRankUpdate(left, right), parsed};
}

Patch read_patch(const SafeTensors& file, const std::string& source) {
  check_format(file, source, kPatch);
  std::map<std::string, StateDict> modules;
  for (const auto& [name, tensor] : file.tensors) {
    const auto [module, field] = split(name, source);
    modules[module][field] = tensor;
  }
  Patch patch;
  for (const auto& [module, fields] : modules) {
    patch.modules.emplace(module, read_change(module, fields, file.metadata, source));
  }
  patch.id = value_or_empty(file.metadata, "id");
  patch.created = value_or_empty(file.metadata, "created");
  patch.base_model = value_or_empty(file.metadata, "base_model");
  patch.base_digest = value_or_empty(file.metadata, "base_digest");
  patch.config = value_or_empty(file.metadata, "config");
  patch.requests = value_or_empty(file.metadata, "requests");
  return patch;
}

}  // namespace

void save_state(const std::filesystem::path& path, const SavedState& state) {
  SafeTensors file{.metadata = {{"format", kState.name},
                                {"version", std::to_string(kState.version)},
                                {"config", state.config}}};
  for (const auto& [component, fields] : state.components) {
    for (const auto& [field, tensor] : fields) {
      TORCH_CHECK_VALUE(field.find('/') == std::string::npos, "the field '", field,
                        "' of component '", component, "' must not contain a slash");
      file.tensors[component + "/" + field] = tensor;
    }
  }
  save_safetensors(path, file);
}

SavedState load_state(const std::filesystem::path& path) {
  const SafeTensors file = load_safetensors(path);
  const std::string source = path.string();
  check_format(file, source, kState);
  SavedState state{.config = value_or_empty(file.metadata, "config")};
  for (const auto& [name, tensor] : file.tensors) {
    const auto [component, field] = split(name, source);
    state.components[component][field] = tensor;
  }
  return state;
}

void save_patch(const std::filesystem::path& path, const Patch& patch) {
  SafeTensors file{.metadata = {{"format", kPatch.name},
                                {"version", std::to_string(kPatch.version)},
                                {"id", patch.id},
                                {"created", patch.created},
                                {"base_model", patch.base_model},
                                {"base_digest", patch.base_digest},
                                {"config", patch.config},
                                {"requests", patch.requests}}};
  for (const auto& [module, change] : patch.modules) {
    file.metadata[module + "/layout"] =
        change.layout == WeightLayout::kLinear ? "linear" : "conv1d";
    if (change.is_low_rank()) {
      const auto& update = std::get<LowRankUpdate>(change.change);
      file.tensors[module + "/left"] = update.left();
      file.tensors[module + "/right"] = update.right();
    } else {
      file.tensors[module + "/delta"] = change.dense();
    }
  }
  save_safetensors(path, file);
}

Patch load_patch(const std::filesystem::path& path) {
  return read_patch(load_safetensors(path), path.string());
}

Patch parse_patch(std::string_view bytes, const std::string& source) {
  return read_patch(parse_safetensors(bytes, source), source);
}

}  // namespace stableedit
