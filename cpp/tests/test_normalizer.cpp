#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "oracle.hpp"
#include "stableedit/normalizer.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kKeyDim = 7;
constexpr int64_t kValueDim = 5;

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
  result.whitening.mode = mode;
  return result;
}

LifelongNormalizer normalizer(WhiteningMode mode, const std::vector<Turn>& turns) {
  LifelongNormalizer result(kKeyDim, kValueDim, options(mode));
  for (const Turn& t : turns) result.observe(t.keys, t.gradients);
  return result;
}

/// Everything that the outside can see of the statistics, to compare bit for bit.
std::vector<at::Tensor> state(const LifelongNormalizer& n) {
  std::vector<at::Tensor> tensors = {n.key_moments().mean(), n.key_moments().m2(),
                                     n.value_moments().mean(), n.value_moments().m2()};
  if (n.value_tracker()) {
    tensors.push_back(n.value_tracker()->mean());
    tensors.push_back(n.value_tracker()->psi());
  }
  for (at::Tensor& tensor : tensors) tensor = tensor.clone();
  return tensors;
}

bool unchanged(const LifelongNormalizer& normalizer, const std::vector<at::Tensor>& before,
               int64_t count) {
  const auto now = state(normalizer);
  return normalizer.count() == count && std::ranges::equal(now, before, oracle::same_bits);
}

void expect_close(const LifelongNormalizer& actual, const LifelongNormalizer& expected) {
  EXPECT_EQ(actual.count(), expected.count());
  const auto a = state(actual);
  const auto b = state(expected);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(close(a[i], b[i], tolerances::of(at::kDouble).products)) << "tensor " << i;
  }
}

class NormalizerByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(NormalizerByDtype, KeysAndGradientsEqualTheOracle) {
  const at::ScalarType dtype = GetParam();
  const std::vector<Turn> turns = {turn(9, 1, dtype), turn(14, 2, dtype)};
  oracle::ModuleEditor expected = {.mode = oracle::Mode::kFull,
                                   .floor = 0.1,
                                   .step_size = 1.0,
                                   .ridge = 1.0,
                                   .eps = oracle::epsilon(dtype)};
  for (const Turn& t : turns) expected.observe(to_eigen(t.keys), to_eigen(t.gradients));

  LifelongNormalizer full = normalizer(WhiteningMode::kFull, turns);
  const Turn& now = turns.back();
  const auto tolerance = tolerances::of(dtype);
  EXPECT_EQ(full.count(), 23);
  EXPECT_TRUE(close(full.normalize_keys(now.keys),
                    oracle::diagonal_normalize(
                        to_eigen(now.keys),
                        oracle::Moments(oracle::concatenate(expected.seen_keys)), expected.eps),
                    tolerance.products));
  EXPECT_TRUE(close(full.normalize_value_gradients(now.gradients),
                    expected.normalized_gradients(to_eigen(now.gradients)), tolerance.solves));
  expected.mode = oracle::Mode::kDiagonal;
  EXPECT_TRUE(close(full.normalize_value_gradients(now.gradients, WhiteningMode::kDiagonal),
                    expected.normalized_gradients(to_eigen(now.gradients)), tolerance.products));
}

INSTANTIATE_TEST_SUITE_P(, NormalizerByDtype,
                         testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf),
                         oracle::dtype_name);

TEST(LifelongNormalizer, NoneChangesNeitherKeysNorGradients) {
  const Turn t = turn(20, 1, at::kFloat);
  LifelongNormalizer none = normalizer(WhiteningMode::kNone, {t});
  EXPECT_TRUE(same_bits(none.normalize_keys(t.keys), t.keys));
  EXPECT_TRUE(same_bits(none.normalize_value_gradients(t.gradients), t.gradients));
}

TEST(LifelongNormalizer, NormalizedStreamHasMeanZeroAndVarianceOne) {
  const Turn t = turn(50, 1);
  LifelongNormalizer diagonal = normalizer(WhiteningMode::kDiagonal, {t});
  for (const at::Tensor& rows :
       {diagonal.normalize_keys(t.keys), diagonal.normalize_value_gradients(t.gradients)}) {
    const oracle::Moments moments(to_eigen(rows));
    EXPECT_LT(moments.mean.norm(), 1e-12);
    EXPECT_TRUE(close(moments.variance(), Matrix::Ones(rows.size(1), 1), 1e-12));
  }
}

TEST(LifelongNormalizer, PooledObservationEqualsOneByOne) {
  const std::vector<Turn> turns = {turn(6, 1), turn(1, 2), turn(0, 3), turn(9, 4)};
  std::vector<at::Tensor> keys, gradients;
  for (const Turn& t : turns) {
    keys.push_back(t.keys);
    gradients.push_back(t.gradients);
  }
  for (const WhiteningMode mode : {WhiteningMode::kDiagonal, WhiteningMode::kFull}) {
    LifelongNormalizer pooled(kKeyDim, kValueDim, options(mode));
    pooled.observe(keys, gradients);
    expect_close(pooled, normalizer(mode, turns));
  }
}

TEST(LifelongNormalizer, MergeEqualsOneStream) {
  for (const WhiteningMode mode : {WhiteningMode::kDiagonal, WhiteningMode::kFull}) {
    LifelongNormalizer a = normalizer(mode, {turn(6, 1)});
    a.merge(normalizer(mode, {turn(9, 2), turn(5, 3)}));
    expect_close(a, normalizer(mode, {turn(6, 1), turn(9, 2), turn(5, 3)}));
  }
}

TEST(LifelongNormalizer, FullFallsBackToDiagonalUntilNuExceedsDimPlusOne) {
  const Turn t = turn(kValueDim + 2, 1);
  LifelongNormalizer full(kKeyDim, kValueDim, options(WhiteningMode::kFull));
  full.observe(t.keys.slice(0, 0, kValueDim + 1), t.gradients.slice(0, 0, kValueDim + 1));
  EXPECT_EQ(full.effective_mode(), WhiteningMode::kDiagonal);
  EXPECT_TRUE(same_bits(full.normalize_value_gradients(t.gradients),
                        full.normalize_value_gradients(t.gradients, WhiteningMode::kDiagonal)));
  EXPECT_FALSE(full.whitener().has_value());

  full.observe(t.keys.slice(0, kValueDim + 1), t.gradients.slice(0, kValueDim + 1));
  EXPECT_EQ(full.effective_mode(), WhiteningMode::kFull);
  full.normalize_value_gradients(t.gradients);
  ASSERT_TRUE(full.whitener().has_value());
  EXPECT_EQ(full.whitener()->mode(), WhiteningMode::kFull);
}

TEST(LifelongNormalizer, ModeOverridesOnlyDownwards) {
  const Turn t = turn(20, 1);
  LifelongNormalizer full = normalizer(WhiteningMode::kFull, {t});
  LifelongNormalizer diagonal = normalizer(WhiteningMode::kDiagonal, {t});
  EXPECT_EQ(full.effective_mode(WhiteningMode::kDiagonal), WhiteningMode::kDiagonal);
  EXPECT_TRUE(same_bits(full.normalize_value_gradients(t.gradients, WhiteningMode::kDiagonal),
                        diagonal.normalize_value_gradients(t.gradients)));
  EXPECT_TRUE(
      same_bits(full.normalize_value_gradients(t.gradients, WhiteningMode::kNone), t.gradients));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { diagonal.effective_mode(WhiteningMode::kFull); },
                                       {"diagonal", "full"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { diagonal.normalize_value_gradients(t.gradients, WhiteningMode::kFull); },
      {"diagonal", "full"}));
}

TEST(LifelongNormalizer, CopyIsASnapshotAndAssigningItBackUndoes) {
  const Turn t = turn(20, 1);
  LifelongNormalizer live = normalizer(WhiteningMode::kFull, {t});
  const at::Tensor keys = live.normalize_keys(t.keys);
  const at::Tensor gradients = live.normalize_value_gradients(t.gradients);
  const LifelongNormalizer snapshot = live;
  const auto before = state(snapshot);

  live.observe(turn(10, 2).keys, turn(10, 2).gradients);
  EXPECT_FALSE(same_bits(live.normalize_value_gradients(t.gradients), gradients));
  EXPECT_TRUE(unchanged(snapshot, before, 20));

  live = snapshot;
  EXPECT_TRUE(unchanged(live, before, 20));
  EXPECT_TRUE(same_bits(live.normalize_keys(t.keys), keys));
  EXPECT_TRUE(same_bits(live.normalize_value_gradients(t.gradients), gradients));

  // Another turn of the size of the undone one: the count is the same, the whitener must not be.
  const Turn other = turn(10, 3);
  live.observe(other.keys, other.gradients);
  LifelongNormalizer fresh = normalizer(WhiteningMode::kFull, {t, other});
  EXPECT_TRUE(same_bits(live.normalize_value_gradients(t.gradients),
                        fresh.normalize_value_gradients(t.gradients)));
}

TEST(LifelongNormalizer, WhitenerFollowsTheDtypeOfTheGradients) {
  const Turn t = turn(20, 1);
  LifelongNormalizer full = normalizer(WhiteningMode::kFull, {t});
  const at::Tensor wide = full.normalize_value_gradients(t.gradients);
  const at::Tensor narrow = full.normalize_value_gradients(t.gradients.to(at::kFloat));
  EXPECT_EQ(narrow.scalar_type(), at::kFloat);
  EXPECT_TRUE(close(narrow, wide, tolerances::of(at::kFloat).solves));
  EXPECT_TRUE(same_bits(full.normalize_value_gradients(t.gradients), wide));
}

TEST(LifelongNormalizer, RefusedBatchesLeaveTheStatistics) {
  const Turn good = turn(9, 1);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const WhiteningMode mode : {WhiteningMode::kNone, WhiteningMode::kFull}) {
    LifelongNormalizer live = normalizer(mode, {turn(20, 2)});
    const auto before = state(live);
    for (const double value : {nan, infinity, -infinity}) {
      const Turn bad = turn(9, 3);
      bad.keys[4][2].fill_(value);
      EXPECT_TRUE(refuses<c10::ValueError>([&] { live.observe(bad.keys, good.gradients); },
                                           {"keys", "NaN"}));
      bad.gradients[0][1].fill_(value);
      EXPECT_TRUE(refuses<c10::ValueError>(
          [&] { live.observe({good.keys, good.keys}, {good.gradients, bad.gradients}); },
          {"value_gradients", "NaN"}));
    }
    EXPECT_TRUE(refuses<c10::ValueError>([&] { live.observe(good.gradients, good.gradients); },
                                         {"keys", "[n, 7]", "[9, 5]"}));
    EXPECT_TRUE(refuses<c10::ValueError>([&] { live.observe(good.keys, good.keys); },
                                         {"value_gradients", "[n, 5]", "[9, 7]"}));
    EXPECT_TRUE(
        refuses<c10::ValueError>([&] { live.observe(good.keys.slice(0, 1), good.gradients); },
                                 {"keys", "value_gradients", "[8, 7]", "[9, 5]"}));
    EXPECT_TRUE(refuses<c10::ValueError>(
        [&] { live.observe({good.keys, good.keys}, {good.gradients}); }, {"2", "1"}));
    EXPECT_TRUE(refuses<c10::TypeError>(
        [&] { live.observe(good.keys.to(at::kInt), good.gradients); }, {"keys", "Int"}));
    EXPECT_TRUE(unchanged(live, before, 20));
  }
}

TEST(LifelongNormalizer, RefusesOptionsThatDoNotGoTogether) {
  NormalizerOptions unbiased = options(WhiteningMode::kFull);
  unbiased.unbiased_batches = true;
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LifelongNormalizer(kKeyDim, kValueDim, unbiased); },
                                       {"unbiased_batches"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [] {
        LifelongNormalizer full(kKeyDim, kValueDim, options(WhiteningMode::kFull));
        full.merge(LifelongNormalizer(kKeyDim, kValueDim, options(WhiteningMode::kDiagonal)));
      },
      {"diagonal", "full"}));
}

}  // namespace
}  // namespace stableedit
