#include <ATen/ops/ones.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "oracle.hpp"
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
using tolerances::close;

constexpr int64_t kDim = 40;
constexpr double kWeight = 0.3;
constexpr double kRidge = 2.0;

// Turns of these sizes stay below k / 4 keys at first, pass it, and end with keys since the fold.
const std::vector<int64_t> kTurns = {3, 5, 4, 6, 1, 25, 2};

Matrix expected_solution(const Matrix& past, const Matrix& keys, double weight = kWeight,
                         double ridge = kRidge) {
  const Matrix system = weight * past.transpose() * past + ridge * Matrix::Identity(kDim, kDim);
  return system.fullPivLu().solve(keys.transpose()).transpose();
}

double spectral_norm(const Matrix& symmetric) {
  return Eigen::SelfAdjointEigenSolver<Matrix>(symmetric).eigenvalues().cwiseAbs().maxCoeff();
}

class PastKeysByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(PastKeysByDtype, EverySolutionIsTheOracles) {
  // The system's condition number, about 200, multiplies the rounding of a half-precision input's
  // float32 arithmetic.
  const double tolerance = 10.0 * tolerances::of(GetParam()).solves;
  PastKeys past(kDim);
  const at::Tensor keys = to_tensor(oracle::correlated(7, kDim, 99), GetParam());
  std::vector<Matrix> seen;
  for (unsigned turn = 0; turn < kTurns.size(); ++turn) {
    const at::Tensor batch = to_tensor(oracle::correlated(kTurns[turn], kDim, turn), GetParam());
    past.update(batch);
    seen.push_back(to_eigen(batch));
    const Matrix all = oracle::concatenate(seen);
    EXPECT_EQ(past.count(), all.rows());
    EXPECT_TRUE(close(past.second_moment(), all.transpose() * all, tolerance));
    EXPECT_TRUE(
        close(past.solve(keys, kWeight, kRidge), expected_solution(all, to_eigen(keys)), tolerance))
        << "turn " << turn;
  }
  const Matrix all = oracle::concatenate(seen);
  EXPECT_TRUE(
      close(past.solve(keys, 1.7, kRidge), expected_solution(all, to_eigen(keys), 1.7), tolerance));
  EXPECT_TRUE(close(past.solve(keys, kWeight, 50.0),
                    expected_solution(all, to_eigen(keys), kWeight, 50.0), tolerance));
}

TEST_P(PastKeysByDtype, UpdateOfTheRidgeIsTheOracles) {
  const double tolerance = 10.0 * tolerances::of(GetParam()).solves;
  PastKeys past(kDim);
  const at::Tensor earlier = to_tensor(oracle::correlated(30, kDim, 1), GetParam());
  past.update(earlier);
  past.update(earlier.slice(0, 0, 4));
  const Matrix p = oracle::concatenate({to_eigen(earlier), to_eigen(earlier).topRows(4)});
  for (const int64_t rows : {int64_t{9}, 3 * kDim}) {  // by a system of the rows, and of the keys
    const at::Tensor keys = to_tensor(oracle::correlated(rows, kDim, 2), GetParam());
    const at::Tensor targets = to_tensor(oracle::normal(rows, 5, 3), GetParam());
    const Matrix h = to_eigen(keys);
    const Matrix system =
        h.transpose() * h + kWeight * p.transpose() * p + kRidge * Matrix::Identity(kDim, kDim);
    const Matrix expected = system.fullPivLu().solve(h.transpose() * to_eigen(targets));
    const LowRankUpdate update = ridge_update(keys, targets, kRidge, past, kWeight);
    EXPECT_TRUE(close(update.dense(), expected.transpose(), tolerance));
    EXPECT_NEAR(update.norm(), expected.norm(), tolerance * expected.norm());
    EXPECT_EQ(update.rank(), rows);  // every answer token owns a row
    EXPECT_TRUE(close(solve_ridge(keys, targets, kRidge, past, kWeight), expected, tolerance));
  }
}

INSTANTIATE_TEST_SUITE_P(, PastKeysByDtype, testing::Values(at::kDouble, at::kFloat, at::kHalf),
                         oracle::dtype_name);

TEST(PastKeys, AFactorisationServesManyTurns) {
  PastKeys past(kDim);
  past.update(to_tensor(oracle::correlated(20, kDim, 1)));
  const at::Tensor keys = to_tensor(oracle::correlated(3, kDim, 2));
  for (unsigned turn = 0; turn < 10; ++turn) {  // one key a turn, up to k / 4
    past.solve(keys, kWeight, kRidge);
    past.solve(keys, kWeight, kRidge);
    past.update(to_tensor(oracle::correlated(1, kDim, 10 + turn)));
  }
  EXPECT_EQ(past.factorisations(), 1);
  past.update(keys);
  past.solve(keys, kWeight, kRidge);
  EXPECT_EQ(past.factorisations(), 2);
}

TEST_P(PastKeysByDtype, ASeedIsAWeightedMomentThatUpdatesAddTo) {
  const double tolerance = 10.0 * tolerances::of(GetParam()).solves;
  const Matrix text = oracle::correlated(60, kDim, 1);
  const at::Tensor moment = to_tensor(text.transpose() * text / 60.0, GetParam());
  const Matrix seed = 15.0 * to_eigen(moment);
  const at::Tensor keys = to_tensor(oracle::correlated(7, kDim, 2), GetParam());
  PastKeys past = PastKeys::seeded(moment, 15.0, 60);
  EXPECT_EQ(past.count(), 60);
  EXPECT_EQ(past.rank(), 0);
  EXPECT_TRUE(close(past.second_moment(), seed, tolerance));
  EXPECT_TRUE(same_bits(PastKeys::seeded(moment.triu(), 15.0, 60).solve(keys, 1.0, kRidge),
                        past.solve(keys, 1.0, kRidge)));
  Matrix system = seed + kRidge * Matrix::Identity(kDim, kDim);
  for (unsigned turn = 0; turn < 4; ++turn) {  // the last one is folded into the moment
    const Matrix h = to_eigen(keys);
    const at::Tensor targets = to_tensor(oracle::normal(7, 5, turn), GetParam());
    const Matrix expected =
        (system + h.transpose() * h).fullPivLu().solve(h.transpose() * to_eigen(targets));
    EXPECT_TRUE(close(ridge_update(keys, targets, kRidge, past, 1.0).dense(), expected.transpose(),
                      tolerance));
    EXPECT_EQ(past.factorisations(), turn < 3 ? 1 : 2);
    const Matrix moment = system - kRidge * Matrix::Identity(kDim, kDim);
    EXPECT_TRUE(close(past.second_moment(), moment, tolerance));
    PastKeys other = past;  // the factor goes, and what was kept beside it stays
    EXPECT_TRUE(close(other.solve(keys, 0.5, 3.0),
                      (0.5 * moment + 3.0 * Matrix::Identity(kDim, kDim))
                          .fullPivLu()
                          .solve(h.transpose())
                          .transpose(),
                      tolerance));
    EXPECT_TRUE(same_bits(other.second_moment(), past.second_moment()));
    EXPECT_TRUE(same_bits(other.solve(keys, 1.0, kRidge), past.solve(keys, 1.0, kRidge)));
    PastKeys loaded = PastKeys::from_state_dict(past.state_dict());
    EXPECT_TRUE(same_bits(loaded.solve(keys, 1.0, kRidge), past.solve(keys, 1.0, kRidge)));
    const at::Tensor batch = to_tensor(oracle::correlated(4, kDim, 20 + turn), GetParam());
    past.update(batch);
    system += to_eigen(batch).transpose() * to_eigen(batch);
  }
}

TEST(PastKeys, SeedsThatAreNone) {
  const at::Tensor moment = at::ones({3, 3});
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::seeded(moment.slice(0, 1)); },
                                       {"moment", "[2, 3]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::seeded(moment, 0.0); }, {"weight", "0"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::seeded(moment, 1.0, 0); }, {"count", "0"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { PastKeys::seeded(moment / 0.0); }, {"moment", "infinite"}));
}

TEST(PastKeys, ManySmallTurnsAreOneLargeOne) {
  const Matrix rows = oracle::correlated(100, kDim, 5);
  PastKeys whole(kDim);
  whole.update(to_tensor(rows));
  PastKeys pieces(kDim);
  const at::Tensor keys = to_tensor(oracle::correlated(3, kDim, 6));
  for (int64_t i = 0; i < 100; ++i) {
    pieces.update(to_tensor(rows.middleRows(i, 1)));
    if (i % 7 == 0) pieces.solve(keys, kWeight, kRidge);
  }
  EXPECT_TRUE(close(pieces.second_moment(), to_eigen(whole.second_moment()), 1e-12));
  EXPECT_TRUE(close(pieces.solve(keys, kWeight, kRidge),
                    to_eigen(whole.solve(keys, kWeight, kRidge)), 1e-11));
}

TEST(PastKeys, WithoutWeightOrKeysOnlyTheRidgeIsLeft) {
  const at::Tensor keys = to_tensor(oracle::correlated(3, kDim, 6), at::kFloat);
  PastKeys past(kDim);
  EXPECT_TRUE(same_bits(past.solve(keys, 5.0, 4.0), keys / 4.0));
  past.update(keys.slice(0, 0, 0));
  EXPECT_EQ(past.count(), 0);
  past.update(keys);
  EXPECT_TRUE(same_bits(past.solve(keys, 0.0, 4.0), keys / 4.0));

  const at::Tensor targets = to_tensor(oracle::normal(3, 5, 3), at::kFloat);
  const LowRankUpdate with = ridge_update(keys, targets, kRidge, past, 0.0);
  const LowRankUpdate without = ridge_update(keys, targets, kRidge);
  EXPECT_TRUE(same_bits(with.left(), without.left()));
  EXPECT_TRUE(same_bits(with.right(), without.right()));
}

TEST(PastKeys, MoreWeightMovesOldKeysLess) {
  PastKeys past(kDim);
  const at::Tensor earlier = to_tensor(oracle::correlated(30, kDim, 1));
  past.update(earlier);
  const at::Tensor keys = to_tensor(oracle::correlated(6, kDim, 2));
  const at::Tensor targets = to_tensor(oracle::normal(6, 5, 3));
  double moved = std::numeric_limits<double>::infinity();
  for (const double weight : {0.0, 0.01, 0.1, 1.0, 100.0}) {
    const Matrix update = to_eigen(ridge_update(keys, targets, kRidge, past, weight).dense());
    const double next = (update * to_eigen(earlier).transpose()).norm();
    EXPECT_LT(next, moved);
    moved = next;
  }
}

TEST(PastKeysSketch, IsExactWhileTheKeysFit) {
  PastKeys exact(kDim);
  PastKeys sketch(kDim, 12);
  const at::Tensor batch = to_tensor(oracle::correlated(24, kDim, 1));
  const at::Tensor keys = to_tensor(oracle::correlated(5, kDim, 2));
  exact.update(batch);
  sketch.update(batch);
  EXPECT_EQ(sketch.shrinkage(), 0.0);
  EXPECT_TRUE(close(sketch.second_moment(), to_eigen(exact.second_moment()), 1e-12));
  EXPECT_TRUE(close(sketch.solve(keys, kWeight, kRidge),
                    to_eigen(exact.solve(keys, kWeight, kRidge)), 1e-11));
}

TEST(PastKeysSketch, KeepsTheBoundOfTheTheory) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    for (const int64_t rank : {1, 5, 20}) {
      PastKeys sketch(kDim, rank);
      std::vector<Matrix> seen;
      for (unsigned turn = 0; turn < 30; ++turn) {
        seen.push_back(oracle::correlated(1 + turn % 9, kDim, turn));
        sketch.update(to_tensor(seen.back(), dtype));
      }
      const Matrix all = oracle::concatenate(seen);
      const Matrix moment = all.transpose() * all;
      const oracle::Vector values =  // ascending
          Eigen::SelfAdjointEigenSolver<Matrix>(moment).eigenvalues();
      double bound = std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < rank; ++j) {
        bound = std::min(bound, values.head(kDim - j).sum() / (2.0 * double(rank - j)));
      }
      const Matrix sketched = to_eigen(sketch.second_moment());
      EXPECT_LE(spectral_norm(moment - sketched), bound * (1.0 + 1e-5));
      EXPECT_GT(sketch.shrinkage(), 0.0);
      EXPECT_EQ(sketch.count(), all.rows());
    }
  }
}

TEST(PastKeysSketch, SolvesWithItsOwnMoment) {
  PastKeys sketch(kDim, 8);
  const at::Tensor keys = to_tensor(oracle::correlated(5, kDim, 200));
  for (unsigned turn = 0; turn < 12; ++turn) {
    sketch.update(to_tensor(oracle::correlated(5, kDim, turn)));
    const Matrix system =
        kWeight * to_eigen(sketch.second_moment()) + kRidge * Matrix::Identity(kDim, kDim);
    EXPECT_TRUE(close(sketch.solve(keys, kWeight, kRidge),
                      system.fullPivLu().solve(to_eigen(keys).transpose()).transpose(), 1e-11));
  }
}

TEST(PastKeysSketch, KeysOfFewDirectionsAreKeptExactly) {
  const Matrix basis = oracle::normal(4, kDim, 1);
  PastKeys sketch(kDim, 8);
  Matrix moment = Matrix::Zero(kDim, kDim);
  for (unsigned turn = 0; turn < 20; ++turn) {
    const Matrix batch = oracle::normal(5, 4, turn) * basis;
    moment += batch.transpose() * batch;
    sketch.update(to_tensor(batch));
  }
  EXPECT_TRUE(close(sketch.second_moment(), moment, 1e-10));
}

class PastKeysByRank : public testing::TestWithParam<int64_t> {};

TEST_P(PastKeysByRank, ACopyIsASnapshot) {
  PastKeys past(kDim, GetParam());
  const at::Tensor keys = to_tensor(oracle::correlated(5, kDim, 100), at::kFloat);
  past.update(to_tensor(oracle::correlated(26, kDim, 1), at::kFloat));
  past.update(to_tensor(oracle::correlated(3, kDim, 2), at::kFloat));
  const PastKeys snapshot = past;
  const at::Tensor before = past.solve(keys, kWeight, kRidge);
  past.update(to_tensor(oracle::correlated(30, kDim, 3), at::kFloat));
  const at::Tensor after = past.solve(keys, kWeight, kRidge);
  EXPECT_FALSE(same_bits(after, before));

  PastKeys again = snapshot;
  EXPECT_EQ(again.count(), 29);
  EXPECT_TRUE(same_bits(again.solve(keys, kWeight, kRidge), before));
  again.update(to_tensor(oracle::correlated(30, kDim, 3), at::kFloat));
  EXPECT_TRUE(same_bits(again.solve(keys, kWeight, kRidge), after));
}

TEST_P(PastKeysByRank, AStateGoesOnBitForBit) {
  const at::Tensor keys = to_tensor(oracle::correlated(5, kDim, 100), at::kFloat);
  PastKeys past(kDim, GetParam());
  for (unsigned turn = 0; turn < 9; ++turn) {  // saved at every stage: empty, few keys, folded
    PastKeys loaded = PastKeys::from_state_dict(past.state_dict());
    EXPECT_EQ(loaded.count(), past.count());
    EXPECT_TRUE(same_bits(loaded.second_moment(), past.second_moment()));
    PastKeys first = loaded;  // goes on with an update, the other with a solution
    const at::Tensor batch = to_tensor(oracle::correlated(4, kDim, turn), at::kFloat);
    if (turn % 2 == 0) {
      EXPECT_TRUE(
          same_bits(loaded.solve(keys, kWeight, kRidge), past.solve(keys, kWeight, kRidge)));
    }
    first.update(batch);
    past.update(batch);
    EXPECT_TRUE(same_bits(first.solve(keys, kWeight, kRidge), past.solve(keys, kWeight, kRidge)));
  }
}

TEST_P(PastKeysByRank, StatesThatAreNone) {
  PastKeys past(kDim, GetParam());
  past.update(to_tensor(oracle::correlated(30, kDim, 1)));
  const auto without = [&](const char* name) {
    StateDict state = past.state_dict();
    state.erase(name);
    return state;
  };
  for (const char* name : {"dim", "rank", "count", "shrinkage", "pieces"}) {
    EXPECT_TRUE(
        refuses<c10::ValueError>([&] { PastKeys::from_state_dict(without(name)); }, {name}));
  }
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::from_state_dict(without("rows")); },
                                       {"PastKeys", "count"}));
  StateDict other = past.state_dict();
  other["dim"] = PastKeys(kDim + 1).state_dict().at("dim");
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::from_state_dict(other); }, {"dim", "41"}));
  for (const double piece : {-1.0, 0.5, 31.0, 1e300}) {
    StateDict state = past.state_dict();
    state["pieces"] = at::ones({2}, at::kDouble) * piece;
    EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::from_state_dict(state); }, {"pieces"}));
  }
  StateDict unknown = past.state_dict();
  unknown["more"] = unknown["dim"];
  EXPECT_TRUE(refuses<c10::ValueError>([&] { PastKeys::from_state_dict(unknown); }, {"more"}));
}

TEST_P(PastKeysByRank, RefusalsChangeNothing) {
  PastKeys past(kDim, GetParam());
  const at::Tensor keys = to_tensor(oracle::correlated(5, kDim, 1));
  past.update(keys);
  const at::Tensor moment = past.second_moment();
  at::Tensor broken = keys.clone();
  broken[1][2].fill_(std::numeric_limits<double>::quiet_NaN());
  EXPECT_TRUE(refuses<c10::ValueError>([&] { past.update(broken); }, {"keys", "NaN"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { past.update(keys.slice(1, 1)); }, {"keys", "40"}));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { past.solve(keys.slice(1, 1), 1.0, 1.0); }, {"keys", "40"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { past.solve(keys, -1.0, 1.0); }, {"weight", "-1"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { past.solve(keys, 1.0, 0.0); }, {"ridge", "0"}));
  EXPECT_TRUE(same_bits(past.second_moment(), moment));
  EXPECT_EQ(past.count(), 5);
}

INSTANTIATE_TEST_SUITE_P(, PastKeysByRank, testing::Values(0, 6),
                         [](const auto& info) { return info.param == 0 ? "Exact" : "Sketch"; });

TEST(PastKeys, ARidgeTooSmallForTheDtypeIsNamedAndChangesNothing) {
  PastKeys past(kDim);
  past.update(to_tensor(oracle::correlated(20, kDim, 1), at::kFloat) * 1e6);
  const at::Tensor keys = to_tensor(oracle::correlated(2, kDim, 2), at::kFloat);
  EXPECT_TRUE(refuses<c10::LinAlgError>([&] { past.solve(keys, 1.0, 1e-12); },
                                        {"past keys", "ridge", "Float"}));
  PastKeys fresh(kDim);
  fresh.update(to_tensor(oracle::correlated(20, kDim, 1), at::kFloat) * 1e6);
  EXPECT_TRUE(same_bits(past.solve(keys, 1.0, 1e9), fresh.solve(keys, 1.0, 1e9)));
}

TEST(PastKeys, Constructors) {
  EXPECT_TRUE(refuses<c10::ValueError>([] { PastKeys(0); }, {"dim", "0"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { PastKeys(3, -1); }, {"rank", "-1"}));
}

}  // namespace
}  // namespace stableedit
