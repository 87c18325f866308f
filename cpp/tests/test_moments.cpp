#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "oracle.hpp"
#include "stableedit/moments.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using oracle::Vector;
using tolerances::close;

constexpr int64_t kDim = 5;
const double kTolerance = tolerances::of(at::kDouble).moments;

RunningMoments moments_of(const std::vector<at::Tensor>& batches, bool unbiased = false) {
  RunningMoments moments(kDim, unbiased);
  for (const at::Tensor& batch : batches) moments.update(batch);
  return moments;
}

testing::AssertionResult equals(const RunningMoments& moments, const Matrix& rows,
                                double tolerance = kTolerance) {
  const oracle::Moments expected(rows);
  if (moments.count() != expected.count) {
    return testing::AssertionFailure() << "count " << moments.count() << " of " << expected.count;
  }
  if (auto result = close(moments.mean(), expected.mean, tolerance); !result) return result;
  if (auto result = close(moments.m2(), expected.m2, tolerance); !result) return result;
  if (auto result = close(moments.variance(), expected.variance(), tolerance); !result) {
    return result;
  }
  return close(moments.stddev(), expected.stddev(), tolerance);
}

class RunningMomentsByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(RunningMomentsByDtype, FoldingInPiecesEqualsTheWhole) {
  const at::Tensor stream = to_tensor(oracle::correlated(40, kDim, 1), GetParam());
  const auto pieces = stream.split_with_sizes({7, 1, 0, 20, 12});
  const RunningMoments moments = moments_of(pieces);
  EXPECT_TRUE(equals(moments, to_eigen(stream), tolerances::of(GetParam()).moments));
  EXPECT_TRUE(equals(moments_of({stream}), to_eigen(stream), tolerances::of(GetParam()).moments));
  EXPECT_EQ(moments.mean().scalar_type(), at::kDouble);
  EXPECT_EQ(moments.m2().scalar_type(), at::kDouble);
}

INSTANTIATE_TEST_SUITE_P(, RunningMomentsByDtype,
                         testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf),
                         oracle::dtype_name);

TEST(RunningMoments, LargeMeanDoesNotSpoilTheVariance) {
  const Matrix deviations = oracle::normal(60, kDim, 2);
  const Matrix rows = (deviations.array() + 1e6).matrix();
  const auto moments = moments_of(to_tensor(rows).split(11));
  // What float64 can hold of the rows themselves: 1e6 * 1e-16 = 1e-10 of their deviations.
  EXPECT_TRUE(close(moments.variance(), oracle::Moments(deviations).variance(), 1e-9));
}

TEST(RunningMoments, MergingEqualsConcatenatingInAnyOrder) {
  const Matrix a = oracle::correlated(9, kDim, 1);
  const Matrix b = oracle::correlated(1, kDim, 2);
  const Matrix c = oracle::correlated(23, kDim, 3);
  const Matrix whole = oracle::concatenate({a, b, c});

  RunningMoments left = moments_of({to_tensor(a)});  // (a + b) + c
  left.merge(moments_of({to_tensor(b)}));
  left.merge(moments_of({to_tensor(c)}));
  RunningMoments inner = moments_of({to_tensor(b)});  // c + (b + a)
  inner.merge(moments_of({to_tensor(a)}));
  RunningMoments right = moments_of({to_tensor(c)});
  right.merge(inner);

  EXPECT_TRUE(equals(left, whole));
  EXPECT_TRUE(equals(right, whole));
}

TEST(RunningMoments, MergingWithAnEmptyOneChangesNothing) {
  const RunningMoments filled = moments_of({to_tensor(oracle::correlated(8, kDim, 1))});
  RunningMoments a = filled;
  a.merge(RunningMoments(kDim));
  RunningMoments b(kDim);
  b.merge(filled);
  for (const RunningMoments& merged : {a, b}) {
    EXPECT_EQ(merged.count(), 8);
    EXPECT_TRUE(same_bits(merged.mean(), filled.mean()));
    EXPECT_TRUE(same_bits(merged.m2(), filled.m2()));
  }
}

TEST(RunningMoments, CountsBeyondTwoToThe24) {
  const Matrix rows = oracle::correlated(3, kDim, 1);
  RunningMoments moments = moments_of({to_tensor(rows)});
  for (int doubling = 0; doubling < 30; ++doubling) moments.merge(moments);
  const int64_t count = int64_t{3} << 30;
  EXPECT_EQ(moments.count(), count);
  const oracle::Moments expected(rows);
  EXPECT_TRUE(close(moments.mean(), expected.mean, kTolerance));
  EXPECT_TRUE(close(moments.m2(), expected.m2 * double(1 << 30), kTolerance));

  // One more sample, far away, still counts: by 1, and with its share of the mean and of M2.
  const Vector delta = Vector::Constant(kDim, 1e6);
  moments.update(to_tensor((expected.mean + delta).transpose()));
  EXPECT_EQ(moments.count(), count + 1);
  const Vector moved = to_eigen(moments.mean()) - expected.mean;
  EXPECT_TRUE(close(moved, delta / double(count + 1), 1e-9));
  const double share = double(count) / double(count + 1);
  const Vector m2 = expected.m2 * double(1 << 30) + share * delta.cwiseAbs2();
  EXPECT_TRUE(close(moments.m2(), m2, kTolerance));
}

TEST(RunningMoments, UnbiasedBatchesAddNTimesTheUnbiasedVariance) {
  const std::vector<Matrix> batches = {oracle::correlated(4, kDim, 1),
                                       oracle::correlated(2, kDim, 2),
                                       oracle::correlated(11, kDim, 3)};
  RunningMoments moments(kDim, /*unbiased_batches=*/true);
  Vector m2 = Vector::Zero(kDim);
  for (const Matrix& batch : batches) {
    moments.update(to_tensor(batch));
    const oracle::Moments own(batch);
    m2 += double(own.count) * own.variance();
  }
  // The Chan terms together are the scatter of the batch means around the mean of everything.
  const oracle::Moments whole(oracle::concatenate(batches));
  for (const Matrix& batch : batches) {
    m2 += double(batch.rows()) * (oracle::Moments(batch).mean - whole.mean).cwiseAbs2();
  }
  EXPECT_TRUE(close(moments.mean(), whole.mean, kTolerance));
  EXPECT_TRUE(close(moments.m2(), m2, kTolerance));
}

TEST(RunningMoments, NoneAndOneSample) {
  for (const bool unbiased : {false, true}) {
    RunningMoments moments(kDim, unbiased);
    moments.update(to_tensor(Matrix(0, kDim)));
    EXPECT_TRUE(equals(moments, Matrix(0, kDim)));
    const Matrix row = oracle::correlated(1, kDim, 1);
    moments.update(to_tensor(row));
    EXPECT_TRUE(equals(moments, row));  // variance and stddev are zero, not NaN
  }
}

TEST(RunningMoments, CopyIsASnapshot) {
  RunningMoments moments = moments_of({to_tensor(oracle::correlated(8, kDim, 1))});
  const RunningMoments snapshot = moments;
  const at::Tensor mean = snapshot.mean().clone();
  const at::Tensor m2 = snapshot.m2().clone();
  moments.update(to_tensor(oracle::correlated(8, kDim, 2)));
  moments.merge(moments);
  EXPECT_EQ(snapshot.count(), 8);
  EXPECT_TRUE(same_bits(snapshot.mean(), mean));
  EXPECT_TRUE(same_bits(snapshot.m2(), m2));
  EXPECT_FALSE(same_bits(moments.mean(), mean));
}

TEST(RunningMoments, SameInputSameBits) {
  const auto pieces = to_tensor(oracle::correlated(30, kDim, 1), at::kFloat).split(7);
  EXPECT_TRUE(same_bits(moments_of(pieces).mean(), moments_of(pieces).mean()));
  EXPECT_TRUE(same_bits(moments_of(pieces).m2(), moments_of(pieces).m2()));
}

TEST(RunningMoments, RefusesWhatDoesNotFit) {
  RunningMoments moments(kDim);
  const at::Tensor wrong = to_tensor(oracle::normal(3, 4, 1));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { moments.update(wrong); }, {"batch", "[n, 5]", "[3, 4]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { moments.update(wrong[0]); }, {"batch", "[4]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { moments.update(at::Tensor()); }, {"batch"}));
  EXPECT_TRUE(refuses<c10::TypeError>(
      [&] { moments.update(to_tensor(oracle::normal(3, kDim, 1), at::kLong)); },
      {"batch", "Long"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { moments.merge(RunningMoments(4)); }, {"4", "5"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { moments.merge(RunningMoments(kDim, true)); },
                                       {"unbiased_batches"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { RunningMoments(0); }, {"dim", "0"}));
  EXPECT_EQ(moments.count(), 0);
}

}  // namespace
}  // namespace stableedit
