// State that goes on where it was left, and patches.

#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <limits>

#include "oracle.hpp"
#include "stableedit/module_editor.hpp"
#include "stableedit/serialization.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::refuses;
using oracle::same_bits;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kKeyDim = 9;
constexpr int64_t kValueDim = 6;
constexpr int64_t kRows = 40;

LowRankUpdate run(ModuleEditor& editor, unsigned turn, at::ScalarType dtype, double scale = 1.0) {
  return editor.edit(to_tensor(oracle::correlated(kRows, kKeyDim, 2 * turn), dtype),
                     to_tensor(oracle::correlated(kRows, kValueDim, 2 * turn + 1), dtype) * scale);
}

std::string temporary(const std::string& name) {
  return (std::filesystem::path(testing::TempDir()) / ("stableedit_" + name)).string();
}

struct Setting {
  const char* name;
  WhiteningMode mode;
  double refresh;
  bool unbiased_batches;
  at::ScalarType dtype;
};

class Resume : public testing::TestWithParam<Setting> {};

TEST_P(Resume, GoesOnBitForBit) {
  const Setting& setting = GetParam();
  NormalizerOptions options;
  options.whitening.mode = setting.mode;
  options.whitening.refresh = setting.refresh;
  options.unbiased_batches = setting.unbiased_batches;
  ModuleEditor original(kKeyDim, kValueDim, options);
  for (unsigned turn = 0; turn < 5; ++turn) run(original, turn, setting.dtype);

  const std::string path = temporary(std::string("resume_") + setting.name);
  save_state(path, {{{"normalizer/all", original.normalizer().state_dict()}}, "{\"a\": 1}"});
  const SavedState state = load_state(path);
  std::filesystem::remove(path);
  EXPECT_EQ(state.config, "{\"a\": 1}");
  ModuleEditor restored(std::make_shared<LifelongNormalizer>(
      LifelongNormalizer::from_state_dict(state.components.at("normalizer/all"))));

  for (unsigned turn = 5; turn < 15; ++turn) {
    const double scale = turn == 10 ? 50.0 : 1.0;  // a jump, which drops the whitener
    const LowRankUpdate a = run(original, turn, setting.dtype, scale);
    const LowRankUpdate b = run(restored, turn, setting.dtype, scale);
    ASSERT_TRUE(same_bits(a.left(), b.left())) << "turn " << turn;
    ASSERT_TRUE(same_bits(a.right(), b.right())) << "turn " << turn;
  }
  EXPECT_EQ(original.normalizer().decompositions(), restored.normalizer().decompositions());
}

INSTANTIATE_TEST_SUITE_P(
    Settings, Resume,
    testing::Values(Setting{"full", WhiteningMode::kFull, 0.0, false, at::kFloat},
                    Setting{"reusing", WhiteningMode::kFull, 0.5, false, at::kFloat},
                    Setting{"float64", WhiteningMode::kFull, 0.5, false, at::kDouble},
                    Setting{"diagonal", WhiteningMode::kDiagonal, 0.0, true, at::kFloat},
                    Setting{"none", WhiteningMode::kNone, 0.0, false, at::kFloat}),
    [](const auto& setting) { return setting.param.name; });

/// A state as file version 1 has it: a whitener without a mean square, and a sample of a turn.
StateDict version_1(StateDict state) {
  state.erase("whitener.mean_square");
  state["whitener_energy"] = at::ones({}, at::kDouble);
  state["sample"] = at::ones({4, kValueDim});
  return state;
}

TEST(StateDict, OfVersion1RenewsItsWhitenerAtTheNextTurn) {
  NormalizerOptions options;
  options.whitening.refresh = 1.0;
  ModuleEditor original(kKeyDim, kValueDim, options);
  for (unsigned turn = 0; turn < 4; ++turn)
    run(original, turn, at::kDouble);  // the last decomposes
  auto restored = std::make_shared<LifelongNormalizer>(
      LifelongNormalizer::from_state_dict(version_1(original.normalizer().state_dict())));
  EXPECT_EQ(restored->decompositions(), 3);
  options.whitening.refresh = 0.0;
  auto exact = std::make_shared<LifelongNormalizer>(kKeyDim, kValueDim, options);
  ModuleEditor expected(exact);
  for (unsigned turn = 0; turn < 4; ++turn) run(expected, turn, at::kDouble);

  ModuleEditor resumed(restored);
  const LowRankUpdate update = run(resumed, 4, at::kDouble);  // 200 samples, 160 when it was new
  EXPECT_EQ(restored->decompositions(), 4);
  EXPECT_TRUE(close(update.dense(), run(expected, 4, at::kDouble).dense(),
                    tolerances::of(at::kDouble).solves));
  EXPECT_FALSE(restored->state_dict().contains("sample"));
  EXPECT_TRUE(restored->state_dict().contains("whitener.mean_square"));
}

TEST(StateFile, OfVersion1IsRead) {
  const std::string corpus = STABLEEDIT_CORPUS;
  ASSERT_EQ(load_safetensors(corpus + "/state_v1.safetensors").metadata.at("version"), "1");
  const SavedState state = load_state(corpus + "/state_v1.safetensors");
  EXPECT_EQ(state.config, "{}");
  const auto normalizer =
      LifelongNormalizer::from_state_dict(state.components.at("normalizer/2 -> 3"));
  EXPECT_EQ(normalizer.count(), 8);
  EXPECT_EQ(normalizer.decompositions(), 1);
  EXPECT_EQ(normalizer.options().whitening.refresh, 0.5);
  EXPECT_TRUE(normalizer.whitener().has_value());
}

TEST(StateFile, OfANewerVersionIsRefused) {
  const std::string path = temporary("newer_state");
  save_state(path, {});
  SafeTensors file = load_safetensors(path);
  EXPECT_EQ(file.metadata.at("version"), "2");
  file.metadata["version"] = "3";
  save_safetensors(path, file);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { load_state(path); },
                                       {"stableedit-state file of version 3", "up to 2"}));
  std::filesystem::remove(path);
}

TEST(StateDict, RefusesWhatIsMissingUnknownOrDoesNotFit) {
  ModuleEditor editor(kKeyDim, kValueDim);
  run(editor, 0, at::kFloat);
  const StateDict state = editor.normalizer().state_dict();
  for (const auto& [name, tensor] : state) {
    StateDict bad = state;
    bad[name] = tensor.unsqueeze(0);
    EXPECT_TRUE(refuses<c10::ValueError>([&] { LifelongNormalizer::from_state_dict(bad); },
                                         {"in the state of a"}))
        << name;
  }
  StateDict more = state;
  more["more"] = at::ones({1});
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LifelongNormalizer::from_state_dict(more); },
                                       {"unknown field 'more'"}));
  StateDict many = state;
  many["keys.count"] = at::ones({}, at::kLong) * std::numeric_limits<int64_t>::max();
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LifelongNormalizer::from_state_dict(many); },
                                       {"'count'", "9007199254740992"}));
  StateDict other = state;
  other["tracker.mean"] = at::ones({kValueDim + 1}, at::kDouble);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LifelongNormalizer::from_state_dict(other); },
                                       {"scatter", "must have shape"}));
}

Patch example_patch() {
  const auto matrix = [](int64_t rows, int64_t columns, unsigned seed) {
    return to_tensor(oracle::normal(rows, columns, seed), at::kFloat);
  };
  Patch patch;
  patch.id = "example";
  patch.requests = "{\"count\": 3}";
  patch.modules.emplace("a", WeightChange{LowRankUpdate(matrix(6, 2, 1), matrix(2, 9, 2))});
  patch.modules.emplace(
      "b", WeightChange{LowRankUpdate(matrix(6, 2, 3), matrix(2, 9, 4)), WeightLayout::kConv1D});
  patch.modules.emplace("c", WeightChange{matrix(6, 9, 5)});
  patch.modules.emplace("d", WeightChange{matrix(6, 9, 6), WeightLayout::kConv1D});
  return patch;
}

TEST(Patch, RoundTripAndSum) {
  const std::string path = temporary("patch");
  save_patch(path, example_patch());
  const Patch patch = load_patch(path);
  std::filesystem::remove(path);
  EXPECT_EQ(patch.id, "example");
  EXPECT_EQ(patch.requests, "{\"count\": 3}");

  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    std::map<std::string, at::Tensor> weights, before;
    for (const auto& [name, change] : patch.modules) {
      const bool linear = change.layout == WeightLayout::kLinear;
      weights[name] = at::ones({linear ? 6 : 9, linear ? 9 : 6}, dtype);
      before[name] = weights[name].clone();
    }
    patch.add_to(weights);
    for (const auto& [name, change] : example_patch().modules) {
      oracle::Matrix delta = oracle::to_eigen(change.dense());
      if (change.layout == WeightLayout::kConv1D) delta.transposeInPlace();
      EXPECT_TRUE(close(weights[name], oracle::to_eigen(before[name]) + delta,
                        tolerances::of(at::kFloat).products))
          << name;
    }
    patch.subtract_from(weights);
    for (const auto& [name, weight] : weights) {
      EXPECT_TRUE(close(weight, before[name], tolerances::of(dtype).products)) << name;
    }
  }
}

TEST(Patch, OneWeightThatDoesNotFitAndNothingChanges) {
  const Patch patch = example_patch();
  std::map<std::string, at::Tensor> weights;
  for (const auto& [name, change] : patch.modules) weights[name] = at::ones({6, 9});
  EXPECT_TRUE(refuses<c10::ValueError>([&] { patch.add_to(weights); },
                                       {"module 'b'", "must have shape [9, 6]"}));
  weights.erase("d");
  weights["b"] = at::ones({9, 6});
  EXPECT_TRUE(refuses<c10::ValueError>([&] { patch.add_to(weights); }, {"module 'd'"}));
  for (const auto& [name, weight] : weights) EXPECT_TRUE(weight.eq(1).all().item<bool>()) << name;
}

TEST(Patch, FilesOfAnotherKindOrANewerVersion) {
  SafeTensors file{.metadata = {{"format", "stableedit-patch"}, {"version", "2"}}};
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { parse_patch(serialize_safetensors(file), "new.safetensors"); },
      {"new.safetensors is a stableedit-patch file of version 2", "use a newer stableedit"}));
  file.metadata["format"] = "pt";
  EXPECT_TRUE(refuses<c10::ValueError>([&] { parse_patch(serialize_safetensors(file)); },
                                       {"is not a stableedit-patch file", "'pt'"}));
}

}  // namespace
}  // namespace stableedit
