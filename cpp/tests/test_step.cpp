#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "oracle.hpp"
#include "stableedit/ridge.hpp"
#include "stableedit/step.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::to_eigen;
using oracle::to_tensor;

constexpr int64_t kRows = 9;
constexpr int64_t kKey = 6;
constexpr int64_t kValue = 5;

TEST(FirstOrderDecrease, IsTheInnerProductOfGradientsAndChangesOfTheOutput) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const at::Tensor keys = to_tensor(oracle::normal(kRows, kKey, 1), dtype);
    const at::Tensor gradients = to_tensor(oracle::normal(kRows, kValue, 2), dtype);
    const LowRankUpdate update(to_tensor(oracle::normal(kValue, 3, 3), dtype),
                               to_tensor(oracle::normal(3, kKey, 4), dtype));
    const Matrix change =
        to_eigen(keys) * (to_eigen(update.left()) * to_eigen(update.right())).transpose();
    const double expected = -change.cwiseProduct(to_eigen(gradients)).sum();
    EXPECT_NEAR(first_order_decrease(update, keys, gradients), expected,
                tolerances::of(dtype).products * 50.0);
  }
}

// The ridge update of targets -g is a descent direction of a quadratic loss |h W - y|^2 / 2.
TEST(FirstOrderDecrease, IsPositiveForTheUpdateThatFollowsTheGradient) {
  const at::Tensor keys = to_tensor(oracle::normal(kRows, kKey, 1), at::kDouble);
  const at::Tensor gradients = to_tensor(oracle::normal(kRows, kValue, 2), at::kDouble);
  const LowRankUpdate update = ridge_update(keys, -gradients, 0.1);
  EXPECT_GT(first_order_decrease(update, keys, gradients), 0.0);
  EXPECT_LT(first_order_decrease(update.scaled(-1.0), keys, gradients), 0.0);
}

TEST(FirstOrderDecrease, OfPartsAddsUp) {
  const at::Tensor keys = to_tensor(oracle::normal(kRows, kKey, 1), at::kDouble);
  const at::Tensor gradients = to_tensor(oracle::normal(kRows, kValue, 2), at::kDouble);
  const LowRankUpdate update = ridge_update(keys, -gradients, 0.1);
  const double parts =
      first_order_decrease(update, keys.narrow(0, 0, 4), gradients.narrow(0, 0, 4)) +
      first_order_decrease(update, keys.narrow(0, 4, 5), gradients.narrow(0, 4, 5));
  EXPECT_NEAR(parts, first_order_decrease(update, keys, gradients), 1e-12);
}

TEST(FirstOrderDecrease, RefusesWhatDoesNotFit) {
  const at::Tensor keys = to_tensor(oracle::normal(kRows, kKey, 1), at::kDouble);
  const at::Tensor gradients = to_tensor(oracle::normal(kRows, kValue, 2), at::kDouble);
  const LowRankUpdate update = ridge_update(keys, gradients, 0.1);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { first_order_decrease(update, gradients, gradients); },
                                       {"keys"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { first_order_decrease(update, keys, keys); },
                                       {"value_gradients"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { first_order_decrease(update, keys.narrow(0, 0, 3), gradients); }, {"one row"}));
}

TEST(PolyakStep, IsTheShareOfTheLossOverItsDecrease) {
  EXPECT_DOUBLE_EQ(PolyakStep().choose(3.0, 1.5), 2.0);
  EXPECT_DOUBLE_EQ(PolyakStep({.share = 0.5}).choose(3.0, 1.5), 1.0);
  EXPECT_EQ(PolyakStep().choose(0.0, 1.5), 0.0);
  EXPECT_EQ(PolyakStep().choose(0.0, 0.0), 0.0);
}

TEST(PolyakStep, OnAQuadraticWithLeastLossZeroItHalvesTheError) {
  double x = 8.0;  // loss x^2 / 2, gradient x, update -x: the step is 1/2
  PolyakStep step;
  for (int i = 0; i < 5; ++i) {
    const double alpha = step.choose(x * x / 2.0, x * x);
    step.accept(alpha);
    x -= alpha * x;
  }
  EXPECT_DOUBLE_EQ(x, 0.25);
}

TEST(PolyakStep, GrowsNoFasterThanTheMedianOfRecentStepsAllows) {
  PolyakStep step({.growth = 3.0, .window = 3});
  for (const double taken : {1.0, 2.0, 100.0}) step.accept(taken);
  EXPECT_DOUBLE_EQ(step.choose(1000.0, 1.0), 6.0);
  EXPECT_DOUBLE_EQ(step.choose(5.0, 1.0), 5.0);
  step.accept(0.0);  // nothing to do is no step
  EXPECT_EQ(step.recent(), (std::vector<double>{1.0, 2.0, 100.0}));
  step.accept(4.0);  // 1 is forgotten
  EXPECT_DOUBLE_EQ(step.choose(1000.0, 1.0), 12.0);
}

TEST(PolyakStep, RanksThatReducedTheSameTwoNumbersChooseTheSameBits) {
  PolyakStep first;
  first.accept(0.3);
  PolyakStep second = first;
  const double loss = 0.1 + 0.2;
  EXPECT_EQ(first.choose(loss, 0.7), second.choose(loss, 0.7));
}

TEST(PolyakStep, RefusesWhatNoStepFollowsFrom) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const PolyakStep step;
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(1.0, 0.0); }, {"vanish"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(1.0, -1.0); }, {"does not decrease"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(-1.0, 1.0); }, {"loss"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(nan, 1.0); }, {"loss"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(1.0, nan); }, {"decrease"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { step.choose(1e300, 1e-300); }, {"too little"}));
  PolyakStep other;
  EXPECT_TRUE(refuses<c10::ValueError>([&] { other.accept(-1.0); }, {"step"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { other.accept(nan); }, {"step"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PolyakStep({.share = 0.0}); }, {"share"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PolyakStep({.growth = 1.0}); }, {"growth"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PolyakStep({.window = 0}); }, {"window"}));
}

TEST(PolyakStep, GoesOnFromItsState) {
  PolyakStep step({.share = 1.5, .growth = 2.0, .window = 4});
  for (const double taken : {0.1, 0.7, 0.3}) step.accept(taken);
  const PolyakStep again = PolyakStep::from_state_dict(step.state_dict());
  EXPECT_EQ(again.recent(), step.recent());
  EXPECT_EQ(again.choose(9.0, 0.7), step.choose(9.0, 0.7));
  EXPECT_EQ(PolyakStep::from_state_dict(PolyakStep().state_dict()).recent().size(), 0U);
  StateDict state = step.state_dict();
  state["recent"] = -state["recent"];
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PolyakStep::from_state_dict(state); }, {"recent"}));
  state.erase("recent");
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PolyakStep::from_state_dict(state); }, {"recent"}));
}

}  // namespace
}  // namespace stableedit
