#include <ATen/ops/eye.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "oracle.hpp"
#include "stableedit/null_space.hpp"
#include "stableedit/past_keys.hpp"
#include "stableedit/ridge.hpp"
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

constexpr int64_t kDim = 24;

/// A second moment whose eigenvalues are 1.5^0, 1.5^-1 and so on, in directions of its own.
Matrix moment_of(int64_t dim = kDim) {
  const Matrix rotation = oracle::normal(dim, dim, 7).householderQr().householderQ();
  Vector values(dim);
  for (int64_t i = 0; i < dim; ++i) values[i] = std::pow(1.5, -double(i));
  return rotation * values.asDiagonal() * rotation.transpose();
}

/// P by the released code: all eigenvectors, then the columns below the threshold.
Matrix projector(const Matrix& moment, double threshold) {
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(moment);
  Matrix result = Matrix::Zero(moment.rows(), moment.cols());
  for (int64_t i = 0; i < moment.rows(); ++i) {
    const Vector vector = solver.eigenvectors().col(i);
    if (solver.eigenvalues()[i] < threshold) result += vector * vector.transpose();
  }
  return result;
}

class NullSpaceByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(NullSpaceByDtype, ProjectsAsTheOracle) {
  const Matrix moment = moment_of();
  const at::Tensor keys = to_tensor(oracle::normal(9, kDim, 1), GetParam());
  for (const int64_t removed : {0, 1, 5, 12, 13, 20, 23}) {
    const double threshold = 1.2 * std::pow(1.5, -double(removed));
    const NullSpace space(to_tensor(moment), threshold);
    EXPECT_EQ(space.dim(), kDim);
    EXPECT_EQ(space.rank(), kDim - removed);
    EXPECT_EQ(space.basis().size(1), std::min(removed, kDim - removed));
    const at::Tensor projected = space.project(keys);
    EXPECT_EQ(projected.scalar_type(), GetParam() == at::kDouble ? at::kDouble : at::kFloat);
    EXPECT_TRUE(close(projected, to_eigen(keys) * projector(moment, threshold),
                      tolerances::of(GetParam()).products));
    EXPECT_TRUE(close(space.project(projected), to_eigen(projected), 1e-6));
    const NullSpace narrow = space.to(at::kFloat);
    EXPECT_EQ(narrow.rank(), space.rank());
    EXPECT_TRUE(close(narrow.project(keys), to_eigen(projected), 2e-6));
  }
}

INSTANTIATE_TEST_SUITE_P(, NullSpaceByDtype, testing::Values(at::kDouble, at::kFloat, at::kHalf),
                         oracle::dtype_name);

TEST(NullSpace, ARelativeThresholdKnowsNoScale) {
  const at::Tensor moment = to_tensor(moment_of());
  const NullSpace space(moment, 0.1, true);
  EXPECT_NEAR(space.threshold(), 0.1 * moment_of().trace() / double(kDim), 1e-15);
  EXPECT_EQ(space.rank(), NullSpace(moment, space.threshold()).rank());
  EXPECT_EQ(space.rank(), NullSpace(moment * 1e6, 0.1, true).rank());
  EXPECT_NE(space.rank(), NullSpace(moment * 10.0, space.threshold()).rank());
}

TEST(NullSpace, ReadsTheUpperTriangleAndHoldsNoneOfTheMoment) {
  const at::Tensor moment = to_tensor(moment_of());
  const NullSpace space(moment, 1e-3);
  EXPECT_TRUE(same_bits(NullSpace(moment.triu(), 1e-3).basis(), space.basis()));
  EXPECT_EQ(space.basis().storage().nbytes(), space.basis().nbytes());
}

// AlphaEdit as released: solve(P (K K^T + Cp) + L2 I, P K R^T), Cp of raw keys; two turns.
TEST(NullSpace, ARidgeUpdateOfProjectedKeysIsAlphaEdits) {
  const Matrix moment = moment_of();
  const double threshold = 1e-2;
  const Matrix p = projector(moment, threshold);
  const NullSpace space(to_tensor(moment), threshold);
  PastKeys past(kDim);
  Matrix released_past = Matrix::Zero(kDim, kDim);
  for (unsigned turn = 0; turn < 3; ++turn) {
    const Matrix keys = oracle::normal(7, kDim, turn);
    const Matrix targets = oracle::normal(7, 5, 10 + turn);
    const Matrix system =
        p * (keys.transpose() * keys + released_past) + 10.0 * Matrix::Identity(kDim, kDim);
    const Matrix expected = system.fullPivLu().solve(p * keys.transpose() * targets).transpose();
    const at::Tensor projected = space.project(to_tensor(keys));
    const Matrix update =
        to_eigen(ridge_update(projected, to_tensor(targets), 10.0, past, 1.0).dense());
    EXPECT_TRUE(close(update, expected, 1e-10));
    EXPECT_LE((update * (Matrix::Identity(kDim, kDim) - p)).norm(), 1e-10 * update.norm());
    EXPECT_LE((update * moment * update.transpose()).trace(), threshold * update.squaredNorm());
    past.update(projected);
    released_past += keys.transpose() * keys;
  }
}

TEST(NullSpace, AStateIsTheSame) {
  for (const double threshold : {1e-3, 0.1, 2.0}) {  // basis, complement, identity
    const NullSpace space(to_tensor(moment_of()), threshold);
    const NullSpace loaded = NullSpace::from_state_dict(space.state_dict());
    const at::Tensor keys = to_tensor(oracle::normal(3, kDim, 2), at::kFloat);
    EXPECT_TRUE(same_bits(loaded.project(keys), space.project(keys)));
    EXPECT_EQ(loaded.rank(), space.rank());
    EXPECT_EQ(loaded.threshold(), space.threshold());
    EXPECT_EQ(loaded.complement(), space.complement());
  }
}

TEST(NullSpace, StatesThatAreNone) {
  const NullSpace space(to_tensor(moment_of()), 1e-3);
  const auto with = [&](const char* name, const at::Tensor& value) {
    return [=, state = space.state_dict()]() mutable {
      state[name] = value;
      NullSpace::from_state_dict(state);
    };
  };
  StateDict without = space.state_dict();
  without.erase("complement");
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { NullSpace::from_state_dict(without); }, {"complement"}));
  EXPECT_TRUE(refuses<c10::ValueError>(with("more", at::eye(2)), {"NullSpace", "more"}));
  EXPECT_TRUE(refuses<c10::ValueError>(with("basis", at::eye(5)), {"basis", "[5, 5]"}));
  EXPECT_TRUE(refuses<c10::ValueError>(with("basis", space.basis() * 2), {"orthonormal"}));
  EXPECT_TRUE(refuses<c10::ValueError>(with("threshold", space.state_dict().at("threshold") * -1.0),
                                       {"threshold", "positive"}));
  // Of four directions none is kept: no null space.
  ASSERT_FALSE(space.complement());
  EXPECT_TRUE(refuses<c10::ValueError>(with("basis", at::zeros({4, 0})), {"basis", "[4, 0]"}));
}

TEST(NullSpace, BadInputIsNamed) {
  const at::Tensor moment = to_tensor(moment_of());
  EXPECT_TRUE(refuses<c10::ValueError>([&] { NullSpace(moment.slice(0, 1), 1.0); },
                                       {"moment", "square", "[23, 24]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { NullSpace(at::zeros({0, 0}), 1.0); }, {"moment"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { NullSpace(moment, 0.0); }, {"threshold", "0"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { NullSpace(moment - 2.0 * at::eye(kDim), 1.0); },
                                       {"moment", "eigenvalue", "-1.99"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { NullSpace(moment * std::numeric_limits<double>::infinity(), 1.0); },
      {"moment", "NaN"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { NullSpace(at::eye(3), 0.02); },
                                       {"0.02", "no null space", "least eigenvalue", "larger"}));
  const NullSpace space(moment, 1e-3);
  EXPECT_TRUE(refuses<c10::ValueError>([&] { space.project(at::zeros({2, 3})); },
                                       {"keys", "24", "[2, 3]"}));
  EXPECT_TRUE(refuses<c10::TypeError>([&] { space.to(at::kHalf); }, {"dtype", "float32", "Half"}));
}

}  // namespace
}  // namespace stableedit
