// A module's editor that remembers the keys of its earlier edits.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "oracle.hpp"
#include "stableedit/module_editor.hpp"
#include "stableedit/past_keys.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kDim = 40;
constexpr double kWeight = 0.3;
constexpr double kRidge = 2.0;

TEST(ModuleEditorWithPastKeys, EveryEditKnowsTheKeysBeforeIt) {
  const EditOptions options = {.step_size = 3e-2, .ridge = kRidge, .past_key_weight = kWeight};
  NormalizerOptions normalizer;
  normalizer.whitening.mode = WhiteningMode::kDiagonal;
  ModuleEditor editor(kDim, 6, normalizer, options);
  std::vector<Matrix> seen;
  for (unsigned turn = 0; turn < 4; ++turn) {
    const at::Tensor keys = to_tensor(oracle::correlated(8, kDim, turn));
    const at::Tensor gradients = to_tensor(oracle::correlated(8, 6, turn + 50));
    const LowRankUpdate update = editor.edit(keys, gradients);
    const Matrix h = to_eigen(keys);
    Matrix system = h.transpose() * h + kRidge * Matrix::Identity(kDim, kDim);
    for (const Matrix& past : seen) system += kWeight * past.transpose() * past;
    const Matrix v = to_eigen(editor.targets(keys, gradients));
    EXPECT_TRUE(
        close(update.dense(), system.fullPivLu().solve(h.transpose() * v).transpose(), 1e-10));
    seen.push_back(h);
    EXPECT_EQ(editor.past_keys()->count(), 8 * (turn + 1));
  }
}

TEST(ModuleEditorWithPastKeys, AFailedEditLeavesThem) {
  NormalizerOptions normalizer;
  normalizer.whitening.mode = WhiteningMode::kDiagonal;
  ModuleEditor editor(kDim, 6, normalizer, {.past_key_weight = kWeight});
  editor.edit(to_tensor(oracle::correlated(8, kDim, 1)), to_tensor(oracle::correlated(8, 6, 2)));
  at::Tensor broken = to_tensor(oracle::correlated(8, 6, 3));
  broken[0][0].fill_(std::numeric_limits<double>::infinity());
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { editor.edit(to_tensor(oracle::correlated(8, kDim, 4)), broken); },
      {"value_gradients"}));
  EXPECT_EQ(editor.past_keys()->count(), 8);
}

TEST(ModuleEditorWithPastKeys, AreSharedOrAbsent) {
  const auto normalizer = std::make_shared<LifelongNormalizer>(kDim, 6);
  EXPECT_EQ(ModuleEditor(normalizer).past_keys(), nullptr);
  const auto past = std::make_shared<PastKeys>(kDim, 4);
  EXPECT_EQ(ModuleEditor(normalizer, {.past_key_weight = 0.1}, past).past_keys(), past);
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { ModuleEditor(normalizer, {}, std::make_shared<PastKeys>(3)); }, {"past_keys", "3"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { ModuleEditor(normalizer, {.past_key_weight = -1.0}); },
                                       {"past_key_weight", "-1"}));
}

}  // namespace
}  // namespace stableedit
