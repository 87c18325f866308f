#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "oracle.hpp"
#include "stableedit/ridge.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kKeyDim = 8;
constexpr int64_t kValueDim = 5;
constexpr double kRidge = 0.5;

struct Problem {
  at::Tensor keys;
  at::Tensor targets;
};

Problem problem(int64_t n, at::ScalarType dtype = at::kDouble, unsigned seed = 1) {
  return {to_tensor(oracle::correlated(n, kKeyDim, seed), dtype),
          to_tensor(oracle::normal(n, kValueDim, seed + 1), dtype)};
}

struct Case {
  at::ScalarType dtype;
  int64_t rows;
  std::string name;
};

class RidgeByCase : public testing::TestWithParam<Case> {};

TEST_P(RidgeByCase, PrimalAndDualAreTheOraclesSolution) {
  const auto [keys, targets] = problem(GetParam().rows, GetParam().dtype);
  const Matrix expected = oracle::ridge(to_eigen(keys), to_eigen(targets), kRidge);
  const double tolerance = tolerances::of(GetParam().dtype).solves;
  for (const RidgeForm form : {RidgeForm::kPrimal, RidgeForm::kDual, RidgeForm::kAuto}) {
    const at::Tensor solution = solve_ridge(keys, targets, kRidge, form);
    EXPECT_TRUE(close(solution, expected, tolerance));
    EXPECT_EQ(solution.scalar_type(), GetParam().dtype == at::kDouble ? at::kDouble : at::kFloat);
  }
}

TEST_P(RidgeByCase, UpdateIsTheTransposedSolution) {
  const auto [keys, targets] = problem(GetParam().rows, GetParam().dtype);
  const LowRankUpdate update = ridge_update(keys, targets, kRidge);
  EXPECT_EQ(update.rank(), GetParam().rows);  // every answer token owns a row
  EXPECT_TRUE(same_bits(update.right(), keys.to(update.right().scalar_type())));
  EXPECT_TRUE(close(update.dense(), solve_ridge(keys, targets, kRidge).t(),
                    tolerances::of(GetParam().dtype).solves));
}

INSTANTIATE_TEST_SUITE_P(
    , RidgeByCase,
    testing::Values(Case{at::kDouble, 1, "DoubleOneRow"}, Case{at::kDouble, 3, "DoubleWide"},
                    Case{at::kDouble, kKeyDim, "DoubleSquare"}, Case{at::kDouble, 30, "DoubleTall"},
                    Case{at::kFloat, 3, "FloatWide"}, Case{at::kFloat, 30, "FloatTall"},
                    Case{at::kBFloat16, 3, "BFloat16Wide"}, Case{at::kHalf, 30, "HalfTall"}),
    [](const auto& info) { return info.param.name; });

TEST(Ridge, NormalEquationsHold) {
  const auto [keys, targets] = problem(12);
  const Matrix h = to_eigen(keys);
  const Matrix d = to_eigen(solve_ridge(keys, targets, kRidge));
  EXPECT_TRUE(
      close(h.transpose() * (h * d) + kRidge * d, h.transpose() * to_eigen(targets), 1e-11));
}

TEST(Ridge, MoreRidgeMeansASmallerUpdate) {
  const auto [keys, targets] = problem(12);
  double norm = std::numeric_limits<double>::infinity();
  for (const double ridge : {0.0, 1e-3, 1.0, 10.0, 1e4}) {
    const double next = ridge_update(keys, targets, ridge).norm();
    EXPECT_LT(next, norm);
    norm = next;
  }
}

TEST(Ridge, InterpolatesWithoutRidge) {
  const auto [keys, targets] = problem(4);
  const Matrix d = to_eigen(solve_ridge(keys, targets, 0.0));
  EXPECT_TRUE(close(to_eigen(keys) * d, to_eigen(targets), 1e-10));
  EXPECT_TRUE(close(d, oracle::minimum_norm(to_eigen(keys), to_eigen(targets)), 1e-10));
}

// Whether the Cholesky pivot of a dependent row comes out as zero, negative or tiny and positive is
// a matter of rounding, hence several draws.
class RidgeWithDependentRows : public testing::TestWithParam<at::ScalarType> {};

TEST_P(RidgeWithDependentRows, ZeroRidgeGivesTheMinimumNormSolution) {
  // A factor of 100: the pseudo-inverse of a Gram matrix squares the condition number.
  const double tolerance = 100.0 * tolerances::of(GetParam()).solves;
  for (unsigned seed = 1; seed <= 20; ++seed) {
    Matrix repeated = oracle::correlated(5, kKeyDim, seed);
    repeated.row(3) = repeated.row(0);  // the same key twice, with different targets
    Matrix combined = oracle::correlated(5, kKeyDim, seed);
    combined.row(4) = 0.3 * combined.row(1) - 0.7 * combined.row(2);
    const Matrix targets = oracle::normal(5, kValueDim, seed + 100);
    for (const Matrix& keys : {repeated, combined}) {
      const Matrix expected = oracle::minimum_norm(keys, targets);
      const at::Tensor h = to_tensor(keys, GetParam());
      const at::Tensor v = to_tensor(targets, GetParam());
      EXPECT_TRUE(close(solve_ridge(h, v, 0.0, RidgeForm::kDual), expected, tolerance)) << seed;
      EXPECT_TRUE(close(solve_ridge(h, v, 0.0, RidgeForm::kPrimal), expected, tolerance)) << seed;
      EXPECT_TRUE(close(ridge_update(h, v, 0.0).dense(), expected.transpose(), tolerance)) << seed;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, RidgeWithDependentRows, testing::Values(at::kDouble, at::kFloat),
                         oracle::dtype_name);

TEST(Ridge, RepeatedKeysAreNoProblemWithRidge) {
  const auto [keys, targets] = problem(6, at::kFloat);
  keys[4].copy_(keys[1]);
  keys[5].zero_();
  EXPECT_TRUE(close(ridge_update(keys, targets, 10.0).dense(),
                    oracle::ridge(to_eigen(keys), to_eigen(targets), 10.0).transpose(),
                    tolerances::of(at::kFloat).solves));
}

TEST(Ridge, NoRowsGiveNoUpdate) {
  const auto [keys, targets] = problem(0);
  const LowRankUpdate update = ridge_update(keys, targets, kRidge);
  EXPECT_EQ(update.rank(), 0);
  EXPECT_EQ(update.norm(), 0.0);
  for (const RidgeForm form : {RidgeForm::kPrimal, RidgeForm::kDual, RidgeForm::kAuto}) {
    EXPECT_TRUE(
        close(solve_ridge(keys, targets, kRidge, form), Matrix::Zero(kKeyDim, kValueDim), 0.0));
  }
}

TEST(Ridge, InputsAreNotTouchedAndSameInputSameBits) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const auto [keys, targets] = problem(12, dtype);
    const at::Tensor keys_before = keys.clone();
    const at::Tensor targets_before = targets.clone();
    for (const RidgeForm form : {RidgeForm::kPrimal, RidgeForm::kDual}) {
      EXPECT_TRUE(same_bits(solve_ridge(keys, targets, kRidge, form),
                            solve_ridge(keys, targets, kRidge, form)));
    }
    EXPECT_TRUE(same_bits(keys, keys_before));
    EXPECT_TRUE(same_bits(targets, targets_before));
  }
}

TEST(Ridge, Refusals) {
  const auto [keys, targets] = problem(4);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(refuses<c10::ValueError>([&] { solve_ridge(keys, targets.slice(0, 1), 1.0); },
                                       {"keys", "targets", "[4, 8]", "[3, 5]"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { ridge_update(keys[0], targets, 1.0); }, {"keys", "[8]"}));
  EXPECT_TRUE(refuses<c10::TypeError>([&] { solve_ridge(keys.to(at::kInt), targets, 1.0); },
                                      {"keys", "Int"}));
  for (const double ridge : {-1.0, nan, std::numeric_limits<double>::infinity()}) {
    EXPECT_TRUE(refuses<c10::ValueError>([&] { solve_ridge(keys, targets, ridge); }, {"ridge"}));
    EXPECT_TRUE(refuses<c10::ValueError>([&] { ridge_update(keys, targets, ridge); }, {"ridge"}));
  }
  at::Tensor broken = targets.clone();
  broken[1][2].fill_(nan);
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { ridge_update(keys, broken, 1.0); }, {"targets", "NaN"}));
}

}  // namespace
}  // namespace stableedit
