#pragma once

// One table of tolerances, by the dtype of the input. All are relative to the Frobenius norm of the
// expected value. Half-precision input is widened to float32 before anything is computed, and the
// oracle starts from the same rounded numbers: its row is that of float32.

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "oracle.hpp"

namespace tolerances {

struct Row {
  double moments;   ///< sums that run in float64 whatever the input
  double products;  ///< one matrix product or element-wise chain in the compute dtype
  double solves;    ///< anything behind a factorisation of a well-conditioned matrix
};

inline Row of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return {.moments = 1e-12, .products = 1e-12, .solves = 1e-10};
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
      return {.moments = 1e-12, .products = 2e-6, .solves = 5e-5};
    default:
      ADD_FAILURE() << "no tolerances for this dtype";
      return {};
  }
}

/// For EXPECT_TRUE: says how far apart the two are, and how far they may be.
inline testing::AssertionResult close(const oracle::Matrix& actual, const oracle::Matrix& expected,
                                      double tolerance) {
  if (actual.rows() != expected.rows() || actual.cols() != expected.cols()) {
    return testing::AssertionFailure()
           << "shape [" << actual.rows() << ", " << actual.cols() << "], expected ["
           << expected.rows() << ", " << expected.cols() << "]";
  }
  const double scale = expected.size() == 0 ? 0.0 : expected.norm();
  const double error = expected.size() == 0 ? 0.0 : (actual - expected).norm();
  const double bound = scale > 0.0 ? tolerance * scale : tolerance;
  if (error <= bound) return testing::AssertionSuccess();
  return testing::AssertionFailure()
         << "difference " << error << ", allowed " << bound << "; expected\n"
         << expected.topLeftCorner(std::min<int64_t>(expected.rows(), 4),
                                   std::min<int64_t>(expected.cols(), 4))
         << "\nactual\n"
         << actual.topLeftCorner(std::min<int64_t>(actual.rows(), 4),
                                 std::min<int64_t>(actual.cols(), 4));
}

inline testing::AssertionResult close(const at::Tensor& actual, const oracle::Matrix& expected,
                                      double tolerance) {
  return close(oracle::to_eigen(actual), expected, tolerance);
}

inline testing::AssertionResult close(const at::Tensor& actual, const at::Tensor& expected,
                                      double tolerance) {
  return close(oracle::to_eigen(actual), oracle::to_eigen(expected), tolerance);
}

}  // namespace tolerances
