#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "oracle.hpp"
#include "stableedit/module_editor.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kKeyDim = 9;
constexpr int64_t kValueDim = 6;
constexpr double kFloor = 0.1;
constexpr EditOptions kOptions = {.step_size = 3e-2, .ridge = 2.0};

struct Turn {
  at::Tensor keys;
  at::Tensor gradients;
};

Turn turn(int64_t n, unsigned seed, at::ScalarType dtype = at::kDouble) {
  return {to_tensor(oracle::correlated(n, kKeyDim, seed), dtype),
          to_tensor(oracle::correlated(n, kValueDim, seed + 1000), dtype)};
}

NormalizerOptions options(WhiteningMode mode) {
  NormalizerOptions result;
  result.whitening = {.mode = mode, .floor = kFloor, .floor_mode = FloorMode::kRelative};
  return result;
}

oracle::ModuleEditor expected_editor(WhiteningMode mode, at::ScalarType dtype) {
  return {.mode = mode == WhiteningMode::kNone       ? oracle::Mode::kNone
                  : mode == WhiteningMode::kDiagonal ? oracle::Mode::kDiagonal
                                                     : oracle::Mode::kFull,
          .floor = kFloor,
          .step_size = kOptions.step_size,
          .ridge = kOptions.ridge,
          .eps = oracle::epsilon(dtype)};
}

class ModuleEditorByCase
    : public testing::TestWithParam<std::tuple<WhiteningMode, at::ScalarType>> {};

TEST_P(ModuleEditorByCase, EveryTurnEqualsTheOracle) {
  const auto [mode, dtype] = GetParam();
  ModuleEditor editor(kKeyDim, kValueDim, options(mode), kOptions);
  oracle::ModuleEditor expected = expected_editor(mode, dtype);
  // Fewer rows than columns, more rows than columns, one row; the first turn is too short for full
  // whitening (nu = 6 <= v + 1), so that the fallback is covered as well.
  const int64_t sizes[] = {6, 14, 1, 20};
  for (unsigned i = 0; i < 4; ++i) {
    const Turn t = turn(sizes[i], i, dtype);
    const Turn copy = {t.keys.clone(), t.gradients.clone()};
    const LowRankUpdate update = editor.edit(t.keys, t.gradients);
    expected.observe(to_eigen(copy.keys), to_eigen(copy.gradients));
    EXPECT_TRUE(close(update.dense(),
                      expected.update(to_eigen(copy.keys), to_eigen(copy.gradients)),
                      tolerances::of(dtype).solves))
        << "turn " << i;
    EXPECT_EQ(update.rank(), sizes[i]);
    EXPECT_TRUE(same_bits(t.keys, copy.keys)) << "the caller's keys were changed";
    EXPECT_TRUE(same_bits(t.gradients, copy.gradients)) << "the caller's gradients were changed";
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ModuleEditorByCase,
    testing::Combine(testing::Values(WhiteningMode::kNone, WhiteningMode::kDiagonal,
                                     WhiteningMode::kFull),
                     testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)),
    [](const auto& info) {
      return to_string(std::get<0>(info.param)) + c10::toString(std::get<1>(info.param));
    });

TEST(ModuleEditor, SharedNormalizerPoolsTheStatistics) {
  const auto shared =
      std::make_shared<LifelongNormalizer>(kKeyDim, kValueDim, options(WhiteningMode::kFull));
  ModuleEditor first(shared, kOptions);
  ModuleEditor second(shared, kOptions);
  const Turn a = turn(15, 1);
  const Turn b = turn(15, 2);
  shared->observe({a.keys, b.keys}, {a.gradients, b.gradients});

  oracle::ModuleEditor expected = expected_editor(WhiteningMode::kFull, at::kDouble);
  expected.observe(to_eigen(a.keys), to_eigen(a.gradients));
  expected.observe(to_eigen(b.keys), to_eigen(b.gradients));
  const double tolerance = tolerances::of(at::kDouble).solves;
  EXPECT_TRUE(close(first.compute_update(a.keys, a.gradients).dense(),
                    expected.update(to_eigen(a.keys), to_eigen(a.gradients)), tolerance));
  EXPECT_TRUE(close(second.compute_update(b.keys, b.gradients).dense(),
                    expected.update(to_eigen(b.keys), to_eigen(b.gradients)), tolerance));
  EXPECT_EQ(shared->count(), 30);  // computing observes nothing
  EXPECT_EQ(&first.normalizer(), shared.get());
}

TEST(ModuleEditor, EditIsObserveThenComputeUpdate) {
  const Turn t = turn(20, 1, at::kFloat);
  ModuleEditor whole(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  ModuleEditor parts(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  const LowRankUpdate a = whole.edit(t.keys, t.gradients);
  parts.normalizer().observe(t.keys, t.gradients);
  const LowRankUpdate b = parts.compute_update(t.keys, t.gradients);
  EXPECT_TRUE(same_bits(a.left(), b.left()));
  EXPECT_TRUE(same_bits(a.right(), b.right()));
}

TEST(ModuleEditor, TargetsPointAgainstTheGradientAndGrowWithTheKey) {
  ModuleEditor editor(kKeyDim, kValueDim, options(WhiteningMode::kNone), kOptions);
  const Turn t = turn(5, 1);
  const Matrix targets = to_eigen(editor.targets(t.keys, t.gradients));
  for (int64_t i = 0; i < 5; ++i) {
    const Matrix expected =
        -kOptions.step_size * to_eigen(t.keys).row(i).squaredNorm() * to_eigen(t.gradients).row(i);
    EXPECT_TRUE(close(targets.row(i), expected, tolerances::of(at::kDouble).products));
  }
}

TEST(ModuleEditor, UpdateIsProportionalToTheStepSize) {
  const Turn t = turn(20, 1);
  EditOptions doubled = kOptions;
  doubled.step_size *= 2.0;
  ModuleEditor one(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  ModuleEditor two(kKeyDim, kValueDim, options(WhiteningMode::kFull), doubled);
  EXPECT_TRUE(close(two.edit(t.keys, t.gradients).dense(),
                    one.edit(t.keys, t.gradients).dense() * 2.0,
                    tolerances::of(at::kDouble).products));
}

TEST(ModuleEditor, ModeOverrideOfAWarmUpTurn) {
  const Turn t = turn(20, 1);
  ModuleEditor full(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  ModuleEditor diagonal(kKeyDim, kValueDim, options(WhiteningMode::kDiagonal), kOptions);
  full.normalizer().observe(t.keys, t.gradients);
  EXPECT_TRUE(same_bits(full.compute_update(t.keys, t.gradients, WhiteningMode::kDiagonal).left(),
                        diagonal.edit(t.keys, t.gradients).left()));
}

TEST(ModuleEditor, AFailedEditLeavesTheStatistics) {
  NormalizerOptions no_floor = options(WhiteningMode::kFull);
  no_floor.whitening.floor = 0.0;
  ModuleEditor editor(kKeyDim, kValueDim, no_floor, kOptions);
  const at::Tensor zeros = at::zeros_like(turn(20, 1).gradients);

  // Numerical failure, after the turn has been observed: the covariance of nothing but zeros.
  EXPECT_TRUE(
      refuses<c10::LinAlgError>([&] { editor.edit(turn(20, 1).keys, zeros); }, {"singular"}));
  EXPECT_EQ(editor.normalizer().count(), 0);
  EXPECT_EQ(editor.normalizer().value_tracker()->count(), 0);
  EXPECT_EQ(editor.normalizer().key_moments().mean().abs().sum().item<double>(), 0.0);

  // Bad input.
  const Turn bad = turn(20, 1);
  bad.gradients[3][2].fill_(std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(refuses<c10::ValueError>([&] { editor.edit(bad.keys, bad.gradients); },
                                       {"value_gradients", "NaN"}));
  EXPECT_EQ(editor.normalizer().count(), 0);

  // As if nothing had happened.
  ModuleEditor fresh(kKeyDim, kValueDim, no_floor, kOptions);
  const Turn good = turn(20, 2);
  EXPECT_TRUE(same_bits(editor.edit(good.keys, good.gradients).left(),
                        fresh.edit(good.keys, good.gradients).left()));
}

TEST(ModuleEditor, SameInputSameBits) {
  std::vector<at::Tensor> lefts;
  for (int run = 0; run < 2; ++run) {
    ModuleEditor editor(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
    editor.edit(turn(12, 1, at::kFloat).keys, turn(12, 1, at::kFloat).gradients);
    lefts.push_back(
        editor.edit(turn(7, 2, at::kFloat).keys, turn(7, 2, at::kFloat).gradients).left());
  }
  EXPECT_TRUE(same_bits(lefts[0], lefts[1]));
}

TEST(ModuleEditor, AnEmptyTurnChangesNothing) {
  ModuleEditor editor(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  editor.edit(turn(20, 1).keys, turn(20, 1).gradients);
  const LowRankUpdate update = editor.edit(turn(0, 2).keys, turn(0, 2).gradients);
  EXPECT_EQ(update.rank(), 0);
  EXPECT_EQ(editor.normalizer().count(), 20);
}

TEST(ModuleEditor, Refusals) {
  ModuleEditor editor(kKeyDim, kValueDim, options(WhiteningMode::kFull), kOptions);
  const Turn t = turn(4, 1);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { editor.edit(t.gradients, t.keys); },
                                       {"keys", "[n, 9]", "[4, 6]"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { editor.compute_update(t.keys, t.gradients.slice(0, 1)); },
                               {"keys", "value_gradients", "[4, 9]", "[3, 6]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { ModuleEditor(nullptr, kOptions); }, {"normalizer"}));
  for (const double value : {0.0, -1.0, std::numeric_limits<double>::infinity()}) {
    EXPECT_TRUE(refuses<c10::ValueError>(
        [&] { ModuleEditor(kKeyDim, kValueDim, {}, {.step_size = value}); }, {"step_size"}));
    EXPECT_TRUE(refuses<c10::ValueError>(
        [&] { ModuleEditor(kKeyDim, kValueDim, {}, {.ridge = value}); }, {"ridge"}));
  }
}

}  // namespace
}  // namespace stableedit
