#include "model.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stableedit/safetensors.hpp>
#include <stdexcept>
#include <unordered_map>

namespace hot_edit {
namespace {

constexpr int kFormatVersion = 1;

nlohmann::json read_manifest(const std::filesystem::path& file) {
  std::ifstream stream(file);
  if (!stream)
    throw std::runtime_error(file.string() +
                             " cannot be read; make the directory with export_model.py");
  nlohmann::json manifest = nlohmann::json::parse(stream);
  if (manifest.at("format_version") != kFormatVersion)
    throw std::runtime_error(file.string() + " has format_version " +
                             manifest.at("format_version").dump() + ", this server reads " +
                             std::to_string(kFormatVersion) + "; export the model again");
  return manifest;
}

}  // namespace

Model::Model(const std::filesystem::path& directory, size_t concurrency) {
  auto tensors = stableedit::load_safetensors(directory / "weights.safetensors").tensors;
  const auto take = [&](const std::string& name) {
    const auto found = tensors.find(name);
    if (found == tensors.end())
      throw std::runtime_error("weights.safetensors lacks " + name + "; export the model again");
    return found->second;
  };

  try {
    const nlohmann::json manifest = read_manifest(directory / "manifest.json");
    name_ = manifest.at("model");
    digest_ = manifest.at("model_digest");
    max_length_ = manifest.at("max_length");
    stop_tokens_ = manifest.at("stop_tokens").get<std::vector<int64_t>>();
    for (const auto& module : manifest.at("edit_modules")) {
      const std::string name = module.at("name");
      const bool linear = module.at("layout") == "linear";
      weights_.push_back(
          {name, linear ? stableedit::WeightLayout::kLinear : stableedit::WeightLayout::kConv1D,
           take(name + ".weight")});
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error("manifest.json in " + directory.string() +
                             " is damaged: " + error.what());
  }

  compiled_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
      (directory / "model.pt2").string(), "model", /*run_single_threaded=*/false, concurrency);
  std::unordered_map<std::string, at::Tensor> constants;
  for (const std::string& name : compiled_->get_constant_fqns()) constants[name] = take(name);
  // user_managed: the runner refers to these tensors instead of copying them.
  compiled_->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true,
                            /*user_managed=*/true);
}

Model::~Model() = default;

Answer Model::generate(const std::vector<at::Tensor>& weights, std::vector<int64_t> prompt,
                       size_t max_tokens) const {
  std::vector<int64_t> tokens = std::move(prompt);
  Answer answer;
  while (answer.tokens.size() < max_tokens && tokens.size() < max_length_) {
    const int64_t token = next_token(weights, tokens);
    if (std::ranges::find(stop_tokens_, token) != stop_tokens_.end()) {
      answer.stopped = true;
      break;
    }
    answer.tokens.push_back(token);
    tokens.push_back(token);
  }
  return answer;
}

int64_t Model::next_token(const std::vector<at::Tensor>& weights,
                          std::vector<int64_t>& tokens) const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> inputs{
      at::from_blob(tokens.data(), {1, int64_t(tokens.size())}, at::TensorOptions(at::kLong))};
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  const at::Tensor logits = compiled_->run(inputs).at(0);
  return at::argmax(logits).item<int64_t>();
}

}  // namespace hot_edit
