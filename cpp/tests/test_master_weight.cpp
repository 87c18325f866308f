#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "oracle.hpp"
#include "stableedit/master_weight.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using tolerances::close;

constexpr int64_t kOut = 13;
constexpr int64_t kIn = 10;
constexpr int64_t kRank = 3;
constexpr at::ScalarType kDtypes[] = {at::kBFloat16, at::kHalf, at::kFloat, at::kDouble};

/// Weights as models have them, of rms 0.02, with zeros and with entries far below the updates.
at::Tensor weight(at::ScalarType dtype, int64_t rows = kOut, int64_t columns = kIn) {
  Matrix values = 0.02 * oracle::normal(rows, columns, 1);
  values.col(1).setZero();
  values.row(2).setConstant(-0.0);
  values.col(3) *= 1e-4;
  values.col(4) *= 1e3;
  return to_tensor(values, dtype);
}

/// An update whose entries have about the given size.
LowRankUpdate update(unsigned seed, double size = 1e-5, at::ScalarType dtype = at::kFloat,
                     int64_t rows = kOut, int64_t columns = kIn) {
  return LowRankUpdate(to_tensor(size * oracle::normal(rows, kRank, seed), dtype),
                       to_tensor(oracle::normal(kRank, columns, seed + 500), dtype));
}

class MasterWeightByDtype : public testing::TestWithParam<at::ScalarType> {};

TEST_P(MasterWeightByDtype, LiveIsTheMasterRoundedOnce) {
  const at::Tensor live = weight(GetParam());
  const Matrix original = to_eigen(live);
  void* const storage = live.data_ptr();
  MasterWeight master(live);
  Matrix sum = original;
  for (unsigned seed = 10; seed < 15; ++seed) {
    const LowRankUpdate change = update(seed, 1e-2);
    master.apply(change);
    sum += to_eigen(change.left()) * to_eigen(change.right());
    EXPECT_TRUE(same_bits(live, master.master().to(GetParam())));
  }
  EXPECT_EQ(master.live().data_ptr(), storage);  // the model's own tensor is written
  EXPECT_EQ(master.master().scalar_type(), GetParam() == at::kDouble ? at::kDouble : at::kFloat);
  // float32 at best: the products of float32 factors round.
  EXPECT_TRUE(close(master.master(), sum, tolerances::of(at::kFloat).products));
}

// Exact while all bits that an entry has ever held lie within the 48 of master and residual (106
// for float64): weights of 0.02 and 2e-6, updates of 1e-5 to 1e-4, products with 24 bits of their
// own.
TEST_P(MasterWeightByDtype, RevertInAnyOrderRestoresTheBits) {
  for (const auto& order : {std::vector<unsigned>{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}}) {
    const at::Tensor live = weight(GetParam());
    const at::Tensor original = live.clone();
    MasterWeight master(live);
    const at::Tensor original_master = master.master().clone();
    std::vector<LowRankUpdate> updates;
    for (unsigned i = 0; i < 4; ++i) {
      updates.push_back(update(20 + i, i % 2 == 0 ? 1e-5 : 1e-4));
      master.apply(updates.back());
    }
    EXPECT_FALSE(same_bits(live, original));
    for (const unsigned i : order) master.revert(updates[i]);
    EXPECT_TRUE(same_bits(live, original));
    EXPECT_TRUE(same_bits(master.master(), original_master));
  }
}

TEST_P(MasterWeightByDtype, TakingOneUpdateOutLeavesTheBitsOfTheOthers) {
  const at::Tensor with = weight(GetParam());
  const at::Tensor without = with.clone();
  MasterWeight a(with);
  MasterWeight b(without);
  for (unsigned seed = 0; seed < 12; ++seed) {  // applied and reverted in turn
    a.apply(update(100 + seed, 1e-4));
    a.apply(update(200 + seed));
    b.apply(update(200 + seed));
    if (seed >= 3) a.revert(update(100 + seed - 3, 1e-4));
  }
  for (unsigned seed = 9; seed < 12; ++seed) a.revert(update(100 + seed, 1e-4));
  EXPECT_TRUE(same_bits(with, without));
  EXPECT_TRUE(same_bits(a.master(), b.master()));
}

TEST_P(MasterWeightByDtype, MoreRowsThanOneBlockInBothLayouts) {
  const int64_t rows = 530;
  for (const WeightLayout layout : {WeightLayout::kLinear, WeightLayout::kConv1D}) {
    const bool linear = layout == WeightLayout::kLinear;
    const at::Tensor live = weight(GetParam(), rows, kIn);
    const at::Tensor original = live.clone();
    MasterWeight master(live, layout);
    const LowRankUpdate change =
        linear ? update(1, 1e-2, at::kFloat, rows, kIn) : update(1, 1e-2, at::kFloat, kIn, rows);
    const Matrix dense = to_eigen(change.left()) * to_eigen(change.right());
    master.apply(change);
    EXPECT_TRUE(close(master.master(),
                      to_eigen(original) + (linear ? dense : Matrix(dense.transpose())),
                      tolerances::of(at::kFloat).products));
    master.revert(change);
    EXPECT_TRUE(same_bits(live, original));
  }
}

TEST_P(MasterWeightByDtype, CloneAndRestore) {
  for (const bool exact : {true, false}) {
    const at::Tensor live = weight(GetParam());
    MasterWeight master(live, WeightLayout::kLinear, exact);
    master.apply(update(1));
    const MasterWeight snapshot = master.clone();
    const at::Tensor bits = live.clone();
    master.apply(update(2, 1e-2));
    EXPECT_TRUE(same_bits(snapshot.live(), bits));  // shares no memory

    master.restore(snapshot);
    EXPECT_TRUE(same_bits(live, bits));
    MasterWeight other = snapshot.clone();  // continues as the snapshot would have
    master.apply(update(3));
    other.apply(update(3));
    master.revert(update(1));
    other.revert(update(1));
    EXPECT_TRUE(same_bits(live, other.live()));
    EXPECT_TRUE(same_bits(master.master(), other.master()));
    EXPECT_EQ(other.exact_revert(), exact);
  }
}

TEST_P(MasterWeightByDtype, WithoutExactRevertItIsPlainAddition) {
  const at::Tensor live = weight(GetParam());
  const Matrix original = to_eigen(live);
  MasterWeight master(live, WeightLayout::kLinear, /*exact_revert=*/false);
  EXPECT_FALSE(master.exact_revert());
  const bool own_master = GetParam() == at::kFloat || GetParam() == at::kDouble;
  EXPECT_EQ(master.master().data_ptr() == live.data_ptr(), own_master);
  const LowRankUpdate change = update(1, 1e-2);
  master.apply(change);
  const Matrix dense = to_eigen(change.left()) * to_eigen(change.right());
  EXPECT_TRUE(close(master.master(), original + dense, tolerances::of(at::kFloat).products));
  EXPECT_TRUE(same_bits(live, master.master().to(GetParam())));
  master.revert(change);
  EXPECT_TRUE(close(master.master(), original, tolerances::of(at::kFloat).products));
}

TEST_P(MasterWeightByDtype, RefusedUpdatesChangeNothing) {
  const at::Tensor live = weight(GetParam());
  MasterWeight master(live);
  master.apply(update(1));
  const at::Tensor before = live.clone();
  const at::Tensor master_before = master.master().clone();
  const LowRankUpdate transposed = update(2, 1.0, at::kFloat, kIn, kOut);
  for (const auto call : {&MasterWeight::apply, &MasterWeight::revert}) {
    EXPECT_TRUE(refuses<c10::ValueError>([&] { (master.*call)(transposed); },
                                         {"weight", "[10, 13]", "[13, 10]"}));
    for (const double value : {NAN, INFINITY}) {
      const LowRankUpdate left = update(3);
      left.left()[2][1].fill_(value);
      const LowRankUpdate right = update(4);
      right.right()[2][1].fill_(value);
      for (const LowRankUpdate& bad : {left, right}) {
        EXPECT_TRUE(refuses<c10::LinAlgError>([&] { (master.*call)(bad); }, {"update"}));
        EXPECT_TRUE(refuses<c10::LinAlgError>([&] { master.check(bad); }, {"update"}));
      }
    }
  }
  EXPECT_TRUE(refuses<c10::ValueError>([&] { master.check(transposed); }, {"weight"}));
  // Beyond the range of the live dtype: 65504, 3e38 or 1.8e308.
  const double size = GetParam() == at::kHalf ? 1e5 : GetParam() == at::kDouble ? 1e200 : 1e30;
  const at::ScalarType factors = GetParam() == at::kDouble ? at::kDouble : at::kFloat;
  const LowRankUpdate huge(
      to_tensor(Matrix::Constant(kOut, 1, size), factors),
      to_tensor(Matrix::Constant(1, kIn, GetParam() == at::kHalf ? 1.0 : size), factors));
  EXPECT_TRUE(refuses<c10::LinAlgError>([&] { master.check(huge); }, {}));
  EXPECT_TRUE(refuses<c10::LinAlgError>([&] { master.apply(huge); }, {}));

  EXPECT_NO_THROW(master.check(update(5)));
  EXPECT_TRUE(same_bits(live, before));
  EXPECT_TRUE(same_bits(master.master(), master_before));
}

INSTANTIATE_TEST_SUITE_P(, MasterWeightByDtype, testing::ValuesIn(kDtypes), oracle::dtype_name);

TEST(MasterWeight, ManySmallUpdatesOfABfloat16WeightAreNotLost) {
  const at::Tensor original = to_tensor(0.02 * oracle::normal(kOut, kIn, 1), at::kBFloat16);
  const at::Tensor live = original.clone();
  const at::Tensor naive = original.clone();
  MasterWeight master(live);
  Matrix sum = Matrix::Zero(kOut, kIn);
  const LowRankUpdate change = update(1, 1e-6);  // always the same way, 300 times
  for (int i = 0; i < 300; ++i) {
    master.apply(change);
    change.add_to(naive);
    sum += to_eigen(change.left()) * to_eigen(change.right());
  }
  const Matrix moved = to_eigen(master.master()) - to_eigen(original);
  EXPECT_TRUE(close(moved, sum, 1e-4));
  EXPECT_TRUE(close(live, to_eigen(original) + sum, 0x1p-8));
  EXPECT_FALSE(close(to_eigen(naive) - to_eigen(original), sum, 0.5));  // what the master is for
}

TEST(MasterWeight, AnAppliedUpdateCanAlwaysBeReverted) {
  // Reverting may not be refused because the bound of `check` is a cautious one.
  const at::Tensor live = to_tensor(Matrix::Constant(kOut, kIn, 10000.0), at::kHalf);
  const at::Tensor original = live.clone();
  MasterWeight master(live);
  const LowRankUpdate change(to_tensor(Matrix::Constant(kOut, 1, 30000.0), at::kFloat),
                             to_tensor(Matrix::Ones(1, kIn), at::kFloat));
  master.apply(change);
  master.revert(change);
  EXPECT_TRUE(same_bits(live, original));
}

TEST(MasterWeight, RankZeroAndNonContiguousWeights) {
  const at::Tensor storage = weight(at::kBFloat16, kIn, kOut);
  const at::Tensor original = storage.clone();
  MasterWeight master(storage.t());
  master.apply(
      LowRankUpdate(to_tensor(Matrix(kOut, 0), at::kFloat), to_tensor(Matrix(0, kIn), at::kFloat)));
  EXPECT_TRUE(same_bits(storage, original));
  master.apply(update(1, 1e-2));
  EXPECT_FALSE(same_bits(storage, original));
  EXPECT_TRUE(same_bits(storage.t(), master.master().to(at::kBFloat16)));
  master.revert(update(1, 1e-2));
  EXPECT_TRUE(same_bits(storage, original));
}

TEST(MasterWeight, Refusals) {
  EXPECT_TRUE(refuses<c10::ValueError>([] { MasterWeight(weight(at::kFloat).select(0, 0)); },
                                       {"live", "[10]"}));
  EXPECT_TRUE(refuses<c10::TypeError>([] { MasterWeight(weight(at::kFloat).to(at::kChar)); },
                                      {"live", "Char"}));
  MasterWeight master(weight(at::kFloat));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { master.restore(MasterWeight(weight(at::kFloat, 6, 6))); }, {"snapshot"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { master.restore(MasterWeight(weight(at::kHalf))); },
                                       {"snapshot"}));
}

}  // namespace
}  // namespace stableedit
