#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "oracle.hpp"
#include "stableedit/niw.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kDim = 6;
const NiwPrior kNoPrior;
const NiwPrior kPrior = {.kappa = 2.5, .psi = 0.7, .nu = 4.0};

NormalInverseWishart track(const std::vector<at::Tensor>& batches, NiwPrior prior = {}) {
  NormalInverseWishart tracker(batches.front().size(1), prior);
  for (const at::Tensor& batch : batches) tracker.update(batch);
  return tracker;
}

oracle::Niw expect(const std::vector<at::Tensor>& batches, NiwPrior prior = {}) {
  oracle::Niw niw(batches.front().size(1), prior.kappa, prior.psi, prior.nu);
  for (const at::Tensor& batch : batches) niw.update(to_eigen(batch));
  return niw;
}

testing::AssertionResult equals(const NormalInverseWishart& tracker, const oracle::Niw& expected,
                                at::ScalarType dtype = at::kDouble) {
  const tolerances::Row tolerance = tolerances::of(dtype);
  if (tracker.kappa() != expected.kappa || tracker.nu() != expected.nu) {
    return testing::AssertionFailure() << "kappa " << tracker.kappa() << ", nu " << tracker.nu()
                                       << "; expected " << expected.kappa << ", " << expected.nu;
  }
  if (auto result = close(tracker.mean(), expected.m, tolerance.moments); !result) return result;
  return close(tracker.psi(), expected.psi, tolerance.products);
}

struct Case {
  at::ScalarType dtype;
  NiwPrior prior;
  std::string name;
};

class NiwByCase : public testing::TestWithParam<Case> {};

TEST_P(NiwByCase, EqualsTheSequentialFormulasHoweverTheStreamIsCut) {
  const auto& [dtype, prior, name] = GetParam();
  const at::Tensor stream = to_tensor(oracle::correlated(40, kDim, 1), dtype);
  const auto pieces = stream.split_with_sizes({7, 1, 0, 20, 12});
  const NormalInverseWishart tracker = track(pieces, prior);
  const oracle::Niw expected = expect(pieces, prior);
  EXPECT_TRUE(equals(tracker, expected, dtype));
  EXPECT_TRUE(equals(track({stream}, prior), expected, dtype));
  EXPECT_TRUE(close(tracker.covariance(), expected.covariance(), tolerances::of(dtype).products));
  EXPECT_EQ(tracker.psi().scalar_type(), at::kDouble);
  EXPECT_EQ(tracker.covariance_upper(at::kFloat).scalar_type(), at::kFloat);
}

INSTANTIATE_TEST_SUITE_P(, NiwByCase,
                         testing::Values(Case{at::kDouble, kNoPrior, "Double"},
                                         Case{at::kFloat, kNoPrior, "Float"},
                                         Case{at::kBFloat16, kNoPrior, "BFloat16"},
                                         Case{at::kHalf, kNoPrior, "Half"},
                                         Case{at::kDouble, kPrior, "DoublePrior"},
                                         Case{at::kFloat, kPrior, "FloatPrior"}),
                         [](const auto& info) { return info.param.name; });

TEST(NormalInverseWishart, DimensionsBeyondOneBlock) {
  const int64_t dim = 1100;  // more than two blocks of the symmetric product, the last one ragged
  const auto pieces = to_tensor(oracle::normal(12, dim, 1)).split(7);
  EXPECT_TRUE(equals(track(pieces), expect(pieces)));
}

TEST(NormalInverseWishart, MergingEqualsConcatenatingInAnyOrder) {
  const auto parts = to_tensor(oracle::correlated(33, kDim, 1)).split_with_sizes({9, 1, 23});
  for (const NiwPrior& prior : {kNoPrior, kPrior}) {
    const auto a = track({parts[0]}, prior);
    const auto b = track({parts[1]}, prior);
    const auto c = track({parts[2]}, prior);
    NormalInverseWishart left = a;  // (a + b) + c
    left.merge(b);
    left.merge(c);
    NormalInverseWishart inner = b;  // c + (b + a)
    inner.merge(a);
    NormalInverseWishart right = c;
    right.merge(inner);
    const oracle::Niw whole = expect(parts, prior);  // the prior counts once
    EXPECT_TRUE(equals(left, whole));
    EXPECT_TRUE(equals(right, whole));
  }
}

TEST(NormalInverseWishart, MergingWithAnEmptyOneChangesNothing) {
  for (const NiwPrior& prior : {kNoPrior, kPrior}) {
    const NormalInverseWishart empty(kDim, prior);
    const auto filled = track({to_tensor(oracle::correlated(8, kDim, 1))}, prior);
    NormalInverseWishart a = filled;
    a.merge(empty);
    NormalInverseWishart b = empty;
    b.merge(filled);
    for (const NormalInverseWishart& merged : {a, b}) {
      EXPECT_EQ(merged.count(), 8);
      EXPECT_EQ(merged.kappa(), filled.kappa());
      EXPECT_TRUE(same_bits(merged.mean(), filled.mean()));
      EXPECT_TRUE(same_bits(merged.psi(), filled.psi()));
    }
  }
}

TEST(NormalInverseWishart, CountsBeyondTwoToThe24) {
  const Matrix rows = oracle::correlated(3, kDim, 1);
  auto tracker = track({to_tensor(rows)}, {.kappa = 0.5, .psi = 0.0, .nu = 0.25});
  for (int doubling = 0; doubling < 30; ++doubling) tracker.merge(tracker);
  const int64_t count = int64_t{3} << 30;
  EXPECT_EQ(tracker.count(), count);
  EXPECT_EQ(tracker.kappa(), double(count) + 0.5);
  EXPECT_EQ(tracker.nu(), double(count) + 0.25);
  const oracle::Niw once = expect({to_tensor(rows)});
  EXPECT_TRUE(close(tracker.covariance(), once.psi / 3.0, 1e-8));

  const auto before = tracker.mean();
  tracker.update(to_tensor((once.m.array() + 1e6).matrix().transpose()));
  EXPECT_EQ(tracker.count(), count + 1);
  EXPECT_EQ(tracker.kappa(), double(count) + 1.5);
  const Matrix moved = to_eigen(tracker.mean()) - to_eigen(before);
  EXPECT_TRUE(close(moved, Matrix::Constant(kDim, 1, 1e6 / double(count + 1)), 1e-8));
}

TEST(NormalInverseWishart, NoneAndOneSample) {
  NormalInverseWishart tracker(kDim, kPrior);
  tracker.update(to_tensor(Matrix(0, kDim)));
  EXPECT_EQ(tracker.count(), 0);
  EXPECT_TRUE(equals(tracker, oracle::Niw(kDim, kPrior.kappa, kPrior.psi, kPrior.nu)));
  const at::Tensor row = to_tensor(oracle::correlated(1, kDim, 1));
  tracker.update(row);
  EXPECT_TRUE(equals(tracker, expect({row}, kPrior)));
}

TEST(NormalInverseWishart, CovarianceExistsOnceNuExceedsDimPlusOne) {
  const at::Tensor rows = to_tensor(oracle::correlated(kDim + 2, kDim, 1));
  NormalInverseWishart tracker = track({rows.slice(0, 0, kDim + 1)});
  EXPECT_FALSE(tracker.has_covariance());  // nu = v + 1: the divisor would be zero
  EXPECT_TRUE(refuses<c10::ValueError>([&] { tracker.covariance(); }, {"nu", "7"}));
  tracker.update(rows.slice(0, kDim + 1));
  EXPECT_TRUE(tracker.has_covariance());
  EXPECT_TRUE(close(tracker.covariance(), expect({rows}).psi, 1e-12));  // nu - v - 1 = 1

  EXPECT_TRUE(NormalInverseWishart(kDim, {.nu = kDim + 1.5}).has_covariance());
}

TEST(NormalInverseWishart, CovarianceIsExactlySymmetricAndPositive) {
  const auto pieces = to_tensor(oracle::correlated(40, kDim, 1), at::kFloat).split(9);
  NormalInverseWishart tracker = track(pieces, kPrior);
  tracker.merge(track(pieces, kPrior));
  const at::Tensor covariance = tracker.covariance();
  EXPECT_TRUE(same_bits(covariance, covariance.t()));
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(to_eigen(covariance));
  EXPECT_GT(solver.eigenvalues().minCoeff(), 0.0);
}

TEST(NormalInverseWishart, CopyIsASnapshot) {
  auto tracker = track({to_tensor(oracle::correlated(8, kDim, 1))});
  const NormalInverseWishart snapshot = tracker;
  const at::Tensor mean = snapshot.mean().clone();
  const at::Tensor psi = snapshot.psi().clone();
  tracker.update(to_tensor(oracle::correlated(8, kDim, 2)));
  tracker.merge(tracker);
  EXPECT_EQ(snapshot.count(), 8);
  EXPECT_TRUE(same_bits(snapshot.mean(), mean));
  EXPECT_TRUE(same_bits(snapshot.psi(), psi));
  EXPECT_FALSE(same_bits(tracker.psi(), psi));
}

TEST(NormalInverseWishart, ReadingTheStateDoesNotGiveAccessToIt) {
  const auto tracker = track({to_tensor(oracle::correlated(8, kDim, 1))}, kPrior);
  const at::Tensor psi = tracker.psi().clone();
  tracker.psi().zero_();
  tracker.covariance().zero_();
  EXPECT_TRUE(same_bits(tracker.psi(), psi));
}

TEST(NormalInverseWishart, SameInputSameBits) {
  const auto pieces = to_tensor(oracle::correlated(30, kDim, 1), at::kFloat).split(7);
  EXPECT_TRUE(same_bits(track(pieces).mean(), track(pieces).mean()));
  EXPECT_TRUE(same_bits(track(pieces).psi(), track(pieces).psi()));
}

TEST(NormalInverseWishart, RefusesWhatDoesNotFit) {
  NormalInverseWishart tracker(kDim);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { tracker.update(to_tensor(oracle::normal(3, 4, 1))); },
                                       {"batch", "[n, 6]", "[3, 4]"}));
  EXPECT_TRUE(refuses<c10::TypeError>(
      [&] { tracker.update(to_tensor(oracle::normal(3, kDim, 1), at::kInt)); }, {"batch", "Int"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { tracker.merge(NormalInverseWishart(4)); }, {"4", "6"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { tracker.merge(NormalInverseWishart(kDim, kPrior)); },
                                       {"prior"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { NormalInverseWishart(0); }, {"dim", "0"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([] { NormalInverseWishart(kDim, {.kappa = -1.0}); }, {"kappa"}));
  EXPECT_EQ(tracker.count(), 0);
}

}  // namespace
}  // namespace stableedit
