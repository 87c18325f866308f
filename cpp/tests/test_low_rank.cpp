#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "oracle.hpp"
#include "stableedit/low_rank.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kOut = 7;
constexpr int64_t kIn = 11;
constexpr int64_t kRank = 4;

LowRankUpdate update(at::ScalarType dtype, unsigned seed = 1, int64_t rank = kRank) {
  return LowRankUpdate(to_tensor(oracle::normal(kOut, rank, seed), dtype),
                       to_tensor(oracle::normal(rank, kIn, seed + 1), dtype));
}

Matrix product(const LowRankUpdate& update) {
  return to_eigen(update.left()) * to_eigen(update.right());
}

double inner(const Matrix& a, const Matrix& b) { return a.cwiseProduct(b).sum(); }

class LowRankUpdateByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(LowRankUpdateByDtype, DenseNormAndInner) {
  const LowRankUpdate a = update(GetParam(), 1);
  const LowRankUpdate b = update(GetParam(), 5, kRank + 2);
  const double tolerance = tolerances::of(GetParam()).products;
  EXPECT_TRUE(close(a.dense(), product(a), tolerance));
  EXPECT_NEAR(a.norm(), product(a).norm(), tolerance * product(a).norm());
  const double scale = product(a).norm() * product(b).norm();
  EXPECT_NEAR(a.inner(b), inner(product(a), product(b)), tolerance * scale);
  EXPECT_NEAR(b.inner(a), a.inner(b), tolerance * scale);
  const LowRankUpdate c = update(GetParam(), 9, 4 * kIn);  // of more rows than the weight has
  EXPECT_NEAR(c.norm(), product(c).norm(), tolerance * product(c).norm());
  EXPECT_NEAR(c.inner(a), inner(product(c), product(a)), tolerance * product(c).norm() * scale);
  EXPECT_EQ(a.rank(), kRank);
  EXPECT_EQ(a.out_features(), kOut);
  EXPECT_EQ(a.in_features(), kIn);
}

INSTANTIATE_TEST_SUITE_P(, LowRankUpdateByDtype, testing::Values(at::kDouble, at::kFloat),
                         oracle::dtype_name);

TEST(LowRankUpdate, NormOfATinyUpdateIsNotLostInFloat32) {
  // Entries near 1e-25: their squares are below what float32 holds.
  const LowRankUpdate tiny(to_tensor(1e-20 * oracle::normal(kOut, kRank, 1), at::kFloat),
                           to_tensor(1e-5 * oracle::normal(kRank, kIn, 2), at::kFloat));
  EXPECT_NEAR(tiny.norm(), product(tiny).norm(), 1e-5 * product(tiny).norm());
}

TEST(LowRankUpdate, SharesOfDisjointRowsAddUpToTheWhole) {
  const LowRankUpdate whole = update(at::kDouble);
  const LowRankUpdate some = whole.select(at::tensor({2, 0}, at::kLong));
  const LowRankUpdate others = whole.select(at::tensor({1, 3}, at::kLong));
  EXPECT_EQ(some.rank(), 2);
  const Matrix left = to_eigen(whole.left());
  const Matrix right = to_eigen(whole.right());
  EXPECT_TRUE(close(some.dense(), left.col(2) * right.row(2) + left.col(0) * right.row(0), 1e-14));
  EXPECT_TRUE(close(to_eigen(some.dense()) + to_eigen(others.dense()), product(whole), 1e-14));
  EXPECT_EQ(whole.select(at::tensor(std::vector<int64_t>{}, at::kLong)).norm(), 0.0);
}

class AddingByDtype : public testing::TestWithParam<std::tuple<at::ScalarType, WeightLayout>> {};

TEST_P(AddingByDtype, AddsTheDenseMatrixAndSubtractTakesItAway) {
  const auto [dtype, layout] = GetParam();
  const LowRankUpdate change = update(dtype);
  const bool linear = layout == WeightLayout::kLinear;
  const Matrix dense = linear ? product(change) : Matrix(product(change).transpose());
  const at::Tensor original = to_tensor(oracle::normal(dense.rows(), dense.cols(), 9), dtype);

  const at::Tensor weight = original.clone();
  void* const storage = weight.data_ptr();
  change.add_to(weight, layout);
  EXPECT_EQ(weight.data_ptr(), storage);
  EXPECT_EQ(weight.scalar_type(), dtype);
  EXPECT_TRUE(close(weight, to_eigen(original) + dense, tolerances::of(dtype).products));
  change.subtract_from(weight, layout);
  EXPECT_TRUE(close(weight, original, 2.0 * dense.norm() * tolerances::of(dtype).products));
}

INSTANTIATE_TEST_SUITE_P(, AddingByDtype,
                         testing::Combine(testing::Values(at::kDouble, at::kFloat),
                                          testing::Values(WeightLayout::kLinear,
                                                          WeightLayout::kConv1D)),
                         [](const auto& info) {
                           return std::string(c10::toString(std::get<0>(info.param))) +
                                  (std::get<1>(info.param) == WeightLayout::kLinear ? "Linear"
                                                                                    : "Conv1D");
                         });

TEST(LowRankUpdate, HalfPrecisionWeightsAreRoundedOnce) {
  // Multiples of powers of two: float32 holds the factors, products and sums exactly, the half
  // types only the factors and the weight.
  const auto multiples = [](double unit, const Matrix& values) -> Matrix {
    return (values / unit).array().round() * unit;
  };
  const Matrix left = multiples(0x1p-3, oracle::normal(kOut, kRank, 1));
  const Matrix right = multiples(0x1p-4, oracle::normal(kRank, kIn, 2));
  const Matrix original = multiples(0x1p-4, oracle::normal(kOut, kIn, 3));
  const Matrix sum = original + left * right;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    EXPECT_EQ(to_eigen(to_tensor(original, dtype)), original);
    for (const at::ScalarType factors : {at::kFloat, dtype}) {
      const at::Tensor weight = to_tensor(original, dtype);
      LowRankUpdate(to_tensor(left, factors), to_tensor(right, factors)).add_to(weight);
      EXPECT_TRUE(same_bits(weight, to_tensor(sum, dtype)));
    }
  }
}

TEST(LowRankUpdate, WritesThroughATransposedView) {
  const LowRankUpdate change = update(at::kFloat);
  const at::Tensor storage = to_tensor(oracle::normal(kIn, kOut, 9), at::kFloat);
  const Matrix expected = to_eigen(storage).transpose() + product(change);
  change.add_to(storage.t());
  EXPECT_TRUE(close(storage.t(), expected, tolerances::of(at::kFloat).products));
}

TEST(LowRankUpdate, LeavesAWeightThatRequiresGradALeaf) {
  const at::Tensor weight = to_tensor(oracle::normal(kOut, kIn, 9), at::kFloat);
  weight.set_requires_grad(true);
  update(at::kFloat).add_to(weight);
  EXPECT_TRUE(weight.requires_grad());
  EXPECT_TRUE(weight.is_leaf());
}

TEST(LowRankUpdate, RankZeroChangesNothing) {
  const LowRankUpdate nothing = update(at::kFloat, 1, 0);
  const at::Tensor original = to_tensor(oracle::normal(kOut, kIn, 9), at::kFloat);
  const at::Tensor weight = original.clone();
  nothing.add_to(weight);
  nothing.subtract_from(weight);
  EXPECT_TRUE(same_bits(weight, original));
  EXPECT_EQ(nothing.norm(), 0.0);
  EXPECT_EQ(nothing.inner(update(at::kFloat)), 0.0);
  EXPECT_TRUE(close(nothing.dense(), Matrix::Zero(kOut, kIn), 0.0));
}

TEST(LowRankUpdate, SameInputSameBits) {
  const at::Tensor a = to_tensor(oracle::normal(kOut, kIn, 9), at::kFloat);
  const at::Tensor b = a.clone();
  update(at::kFloat).add_to(a);
  update(at::kFloat).add_to(b);
  EXPECT_TRUE(same_bits(a, b));
}

TEST(LowRankUpdate, Refusals) {
  const at::Tensor left = to_tensor(oracle::normal(kOut, kRank, 1));
  const at::Tensor right = to_tensor(oracle::normal(kRank, kIn, 2));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LowRankUpdate(left, right.slice(0, 1)); },
                                       {"left", "right", "[7, 4]", "[3, 11]"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { LowRankUpdate(left.select(0, 0), right); }, {"left", "[4]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { LowRankUpdate(left, at::Tensor()); }, {"right"}));
  EXPECT_TRUE(refuses<c10::TypeError>([&] { LowRankUpdate(left, right.to(at::kFloat)); },
                                      {"left", "Double", "right", "Float"}));
  EXPECT_TRUE(refuses<c10::TypeError>([&] { LowRankUpdate(left.to(at::kInt), right.to(at::kInt)); },
                                      {"left", "Int"}));

  const LowRankUpdate change(left, right);
  const at::Tensor weight = to_tensor(oracle::normal(kOut, kIn, 9));
  const at::Tensor before = weight.clone();
  EXPECT_TRUE(refuses<c10::ValueError>([&] { change.add_to(weight, WeightLayout::kConv1D); },
                                       {"weight", "[11, 7]", "[7, 11]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { change.subtract_from(weight.t()); },
                                       {"weight", "[7, 11]", "[11, 7]"}));
  EXPECT_TRUE(same_bits(weight, before));
  EXPECT_TRUE(
      refuses<c10::TypeError>([&] { change.add_to(weight.to(at::kLong)); }, {"weight", "Long"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { change.inner(LowRankUpdate(right.t(), left.t())); },
                                       {"[7, 11]", "[11, 7]"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { change.select(at::tensor({0}, at::kLong).unsqueeze(0)); }, {"rows", "[1, 1]"}));
  EXPECT_TRUE(
      refuses<c10::TypeError>([&] { change.select(at::tensor({0}, at::kInt)); }, {"rows", "Int"}));
  EXPECT_THROW(change.select(at::tensor({kRank}, at::kLong)), c10::Error);
}

}  // namespace
}  // namespace stableedit
