// The contribution of some rows of a turn, by its definition: the update of all rows less the
// update that is solved without them.

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "oracle.hpp"
#include "stableedit/contribution.hpp"
#include "stableedit/ridge.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kRows = 9;
constexpr int64_t kKeyDim = 12;
constexpr int64_t kValueDim = 5;
constexpr double kRidge = 0.3;
constexpr double kWeight = 0.7;

/// Nearly parallel rows, as keys of a language model are.
Matrix parallel(int64_t rows, unsigned seed) {
  const Matrix direction = 3.0 * oracle::normal(1, kKeyDim, 4711);
  return 0.1 * oracle::normal(rows, kKeyDim, seed) + direction.replicate(rows, 1);
}

Matrix without(const Matrix& rows, const std::vector<int64_t>& owned) {
  std::vector<bool> taken(rows.rows(), false);
  for (const int64_t row : owned) taken[row] = true;
  Matrix rest(rows.rows() - int64_t(owned.size()), rows.cols());
  int64_t next = 0;
  for (int64_t row = 0; row < rows.rows(); ++row) {
    if (!taken[row]) rest.row(next++) = rows.row(row);
  }
  return rest;
}

/// D^T = ((H^T H + weight P^T P + ridge I)^(-1) H^T V)^T, `[v, k]`
Matrix solution(const Matrix& keys, const Matrix& targets, const Matrix& past) {
  const Matrix system = keys.transpose() * keys + kWeight * past.transpose() * past +
                        kRidge * Matrix::Identity(kKeyDim, kKeyDim);
  return system.fullPivLu().solve(keys.transpose() * targets).transpose();
}

at::Tensor mask(const std::vector<int64_t>& rows) {
  at::Tensor owned = at::zeros({kRows}, at::kBool);
  for (const int64_t row : rows) owned[row].fill_(true);
  return owned;
}

const std::vector<std::vector<int64_t>> kOwned = {{}, {0}, {3, 4, 8}, {0, 1, 2, 3, 4, 5, 6, 7, 8}};

class ContributionByDtype : public testing::TestWithParam<at::ScalarType> {
 protected:
  // The keys are nearly parallel: M's condition number, about 3000, multiplies the rounding of the
  // update itself where that is float32.
  const double tolerance =
      (GetParam() == at::kDouble ? 10.0 : 100.0) * tolerances::of(GetParam()).solves;
  const at::Tensor keys = to_tensor(parallel(kRows, 1), GetParam());
  const at::Tensor targets = to_tensor(oracle::normal(kRows, kValueDim, 2), GetParam());

  void expect_shares(const LowRankUpdate& update, const Matrix& past,
                     const std::function<LowRankUpdate(const at::Tensor&)>& share) {
    const Matrix h = to_eigen(keys);
    const Matrix v = to_eigen(targets);
    const Matrix whole = solution(h, v, past);
    for (const auto& owned : kOwned) {
      const LowRankUpdate part = share(mask(owned));
      const Matrix expected = whole - solution(without(h, owned), without(v, owned), past);
      EXPECT_EQ(part.rank(), int64_t(owned.size()));
      EXPECT_EQ(part.left().scalar_type(), update.left().scalar_type());
      // Against the whole: a share may be small, and is to be subtracted from it.
      EXPECT_LE((to_eigen(part.dense()) - expected).norm(), tolerance * whole.norm())
          << owned.size() << " rows";
    }
  }
};

TEST_P(ContributionByDtype, IsWhatIsMissingWithoutTheRows) {
  const LowRankUpdate update = ridge_update(keys, targets, kRidge);
  expect_shares(update, Matrix::Zero(1, kKeyDim),
                [&](const at::Tensor& owned) { return contribution(update, owned, kRidge); });
}

TEST_P(ContributionByDtype, IsWhatIsMissingWithoutTheRowsBesidePastKeys) {
  const at::Tensor earlier = to_tensor(parallel(20, 3), GetParam());
  PastKeys past(kKeyDim);
  past.update(earlier);
  const LowRankUpdate update = ridge_update(keys, targets, kRidge, past, kWeight);
  expect_shares(update, to_eigen(earlier),
                [&](const at::Tensor& owned) { return contribution(update, owned, keys); });
}

INSTANTIATE_TEST_SUITE_P(, ContributionByDtype, testing::Values(at::kDouble, at::kFloat, at::kHalf),
                         oracle::dtype_name);

TEST(Contribution, TheTermsOfAnUpdateAreNone) {
  // What makes this function necessary: the term of a row is far longer than what it contributes.
  const LowRankUpdate update =
      ridge_update(to_tensor(parallel(kRows, 1)), to_tensor(oracle::normal(kRows, 5, 2)), 1e-3);
  const at::Tensor owned = mask({3});
  EXPECT_GT(update.select(owned.nonzero().flatten()).norm(),
            5.0 * contribution(update, owned, 1e-3).norm());
}

TEST(Contribution, SharesAddUpWhereTheyAreTakenOneAfterTheOther) {
  const at::Tensor keys = to_tensor(parallel(kRows, 1));
  const at::Tensor targets = to_tensor(oracle::normal(kRows, kValueDim, 2));
  const LowRankUpdate update = ridge_update(keys, targets, kRidge);
  const LowRankUpdate rest =
      ridge_update(keys.slice(0, 1), targets.slice(0, 1), kRidge);  // without row 0
  const Matrix first = to_eigen(contribution(update, mask({0}), kRidge).dense());
  const Matrix then = to_eigen(contribution(rest, mask({2}).slice(0, 1), kRidge).dense());
  EXPECT_TRUE(close(contribution(update, mask({0, 2}), kRidge).dense(), first + then, 1e-10));
}

TEST(Contribution, RefusesWhatDoesNotFit) {
  const at::Tensor keys = to_tensor(parallel(kRows, 1));
  const LowRankUpdate update =
      ridge_update(keys, to_tensor(oracle::normal(kRows, kValueDim, 2)), kRidge);
  const at::Tensor owned = mask({3});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double ridge : {0.0, -1.0, nan}) {
    EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned, ridge); },
                                         {"ridge", "finite and positive"}));
  }
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned.slice(0, 1), kRidge); },
                                       {"owned", "[9]", "[8]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned.unsqueeze(0), kRidge); },
                                       {"owned", "[1, 9]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, at::Tensor(), kRidge); },
                                       {"owned", "not a tensor"}));
  EXPECT_TRUE(refuses<c10::TypeError>([&] { contribution(update, owned.to(at::kLong), kRidge); },
                                      {"owned must be bool", "Long"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned, keys.slice(0, 1)); },
                                       {"keys", "[8, 12]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned, keys.slice(1, 1)); },
                                       {"keys", "[n, 12]", "[9, 11]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { contribution(update, owned, keys * nan); },
                                       {"keys contains NaN"}));
}

TEST(Contribution, ASingularRestIsAnError) {
  // Y = -H: no ridge update has this, and M_RR = I - H H^T loses its rank where a key has length 1.
  at::Tensor keys = at::zeros({2, 3}, at::kDouble);
  keys[0][0].fill_(1.0);
  keys[1][1].fill_(1.0);
  const LowRankUpdate update(at::ones({4, 2}, at::kDouble), -keys);
  at::Tensor owned = at::zeros({2}, at::kBool);
  owned[0].fill_(true);
  EXPECT_TRUE(refuses<c10::LinAlgError>([&] { contribution(update, owned, keys); }, {"singular"}));
}

}  // namespace
}  // namespace stableedit
