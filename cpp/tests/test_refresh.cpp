// When LifelongNormalizer decomposes anew: after enough growth, after a jump, or every turn.

#include <ATen/ops/mm.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "oracle.hpp"
#include "stableedit/normalizer.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::refuses;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kKeyDim = 3;
constexpr int64_t kValueDim = 6;
constexpr int64_t kRows = 50;

LifelongNormalizer normalizer(double refresh) {
  NormalizerOptions options;
  options.whitening.refresh = refresh;
  return LifelongNormalizer(kKeyDim, kValueDim, options);
}

at::Tensor gradients(unsigned seed, double scale = 1.0, at::ScalarType dtype = at::kDouble) {
  return to_tensor(oracle::correlated(kRows, kValueDim, seed), dtype) * scale;
}

/// Observes a turn and whitens it, as an edit does.
at::Tensor run(LifelongNormalizer& n, unsigned seed, double scale = 1.0) {
  const at::Tensor batch = gradients(seed, scale);
  n.observe(to_tensor(oracle::normal(kRows, kKeyDim, seed), at::kDouble), batch);
  return n.normalize_value_gradients(batch);
}

TEST(Refresh, ZeroDecomposesEveryTurnAndOnlyOnceATurn) {
  LifelongNormalizer n = normalizer(0.0);
  for (unsigned turn = 1; turn <= 5; ++turn) {
    run(n, turn);
    n.normalize_value_gradients(gradients(turn));  // a second module of the pool
    EXPECT_EQ(n.decompositions(), turn);
  }
}

TEST(Refresh, WaitsUntilTheCountHasGrownByTheFraction) {
  LifelongNormalizer n = normalizer(1.0);
  run(n, 1);  // 50 samples
  EXPECT_EQ(n.decompositions(), 1);
  run(n, 2);  // 100: doubled
  EXPECT_EQ(n.decompositions(), 2);
  run(n, 3);  // 150
  EXPECT_EQ(n.decompositions(), 2);
  run(n, 4);  // 200: doubled again
  EXPECT_EQ(n.decompositions(), 3);
}

TEST(Refresh, DecompositionsGrowWithTheLogarithmOfTheStream) {
  LifelongNormalizer n = normalizer(0.1);
  constexpr unsigned kTurns = 2000;
  for (unsigned turn = 1; turn <= kTurns; ++turn) run(n, turn);
  // The first ten or so turns grow the count by more than a tenth each.
  EXPECT_LE(n.decompositions(), 10 + std::ceil(std::log(kTurns / 10.0) / std::log(1.1)));
}

TEST(Refresh, AReusedRootStaysCloseToTheExactOne) {
  LifelongNormalizer reusing = normalizer(0.1);
  LifelongNormalizer exact = normalizer(0.0);
  for (unsigned turn = 1; turn <= 200; ++turn) {
    const at::Tensor a = run(reusing, turn);
    const at::Tensor b = run(exact, turn);
    if (turn > 100) {
      EXPECT_TRUE(close(a, b, 0.05));
    }
  }
  EXPECT_LT(reusing.decompositions(), 60);
}

TEST(Refresh, AJumpOfTheGradientsForcesOne) {
  for (const double scale : {10.0, 0.1}) {
    LifelongNormalizer n = normalizer(1.0);
    for (unsigned turn = 1; turn <= 4; ++turn) run(n, turn);
    const int64_t before = n.decompositions();
    run(n, 5, scale);  // 250 samples: not due by count
    EXPECT_EQ(n.decompositions(), before + 1) << "scale " << scale;
  }
}

TEST(Refresh, GoingBackToASnapshotGoesBackToItsRoot) {
  LifelongNormalizer n = normalizer(0.5);
  for (unsigned turn = 1; turn <= 4; ++turn) run(n, turn);
  const LifelongNormalizer snapshot = n;
  const at::Tensor expected = run(n, 5);
  for (unsigned turn = 6; turn <= 20; ++turn) run(n, turn, 3.0);
  n = snapshot;
  EXPECT_TRUE(oracle::same_bits(run(n, 5), expected));
}

TEST(Refresh, RefusesFieldsOutOfRange) {
  for (const double refresh : {-0.1, 1.5, std::nan("")}) {
    EXPECT_TRUE(refuses<c10::ValueError>([&] { normalizer(refresh); }, {"refresh", "[0, 1]"}));
  }
  WhiteningOptions options;
  options.drift_limit = 1.0;
  EXPECT_TRUE(refuses<c10::ValueError>([&] { options.check(); }, {"drift_limit"}));
}

TEST(Refresh, FactorsAndRootAreTheSameTransform) {
  const at::Tensor rows = gradients(1);
  const at::Tensor sigma = at::mm(rows.t(), rows);
  for (const double floor : {0.01, 0.5, 1.0}) {  // few, about half and most eigenvalues floored
    const Whitener factors = Whitener::full(sigma, floor, FloorMode::kRelative);
    const Whitener root = Whitener::full(sigma, floor, FloorMode::kRelative, /*reused=*/true);
    EXPECT_TRUE(
        close(factors.transform(rows), root.transform(rows), tolerances::of(at::kDouble).products));
    EXPECT_EQ(factors.floored(), root.floored());
  }
}

}  // namespace
}  // namespace stableedit
