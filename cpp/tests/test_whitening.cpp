#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "oracle.hpp"
#include "stableedit/niw.hpp"
#include "stableedit/whitening.hpp"
#include "tolerances.hpp"

namespace stableedit {
namespace {

using oracle::Matrix;
using oracle::refuses;
using oracle::same_bits;
using oracle::to_eigen;
using oracle::to_tensor;
using oracle::to_vector;
using oracle::Vector;
using tolerances::close;

constexpr int64_t kDim = 6;

/// Eigenvalues 1e-4 .. 10 along axes that are not the coordinate axes.
const Vector kEigenvalues = (Vector(4) << 1e-4, 1e-2, 1.0, 10.0).finished();
const double kMeanEigenvalue = kEigenvalues.mean();

Matrix rotation(int64_t dim) { return oracle::normal(dim, dim, 3).householderQr().householderQ(); }

Matrix symmetric(const Matrix& matrix) { return 0.5 * (matrix + matrix.transpose()); }

Matrix covariance(const Matrix& rows) {
  const Matrix centred = rows.rowwise() - rows.colwise().mean();
  return symmetric(centred.transpose() * centred) / double(rows.rows() - 1);
}

Matrix wide_spectrum() {
  const Matrix q = rotation(4);
  return symmetric(q * kEigenvalues.asDiagonal() * q.transpose());
}

TEST(WhiteningNames, RoundTrip) {
  for (const char* name : {"none", "diagonal", "full"}) {
    EXPECT_EQ(to_string(whitening_mode(name)), name);
  }
  for (const char* name : {"absolute", "relative"}) EXPECT_EQ(to_string(floor_mode(name)), name);
  EXPECT_TRUE(refuses<c10::ValueError>([] { whitening_mode("Full"); }, {"'Full'", "'diagonal'"}));
  EXPECT_TRUE(refuses<c10::ValueError>([] { floor_mode(""); }, {"''", "'relative'"}));
}

TEST(Whitener, NoneLeavesItsInput) {
  const at::Tensor rows = to_tensor(oracle::normal(5, kDim, 1), at::kFloat);
  const Whitener whitener = Whitener::none();
  EXPECT_EQ(whitener.mode(), WhiteningMode::kNone);
  EXPECT_TRUE(same_bits(whitener.transform(rows), rows));
}

TEST(Whitener, DiagonalWithAZeroStddevStaysFinite) {
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const Vector stddev = (Vector(3) << 2.0, 0.0, 1e-3).finished();
    const Matrix rows = oracle::normal(4, 3, 1);
    const at::Tensor output =
        Whitener::diagonal(to_vector(stddev)).transform(to_tensor(rows, dtype));
    EXPECT_TRUE(to_eigen(output).allFinite());
    const Vector scale = (stddev.array() + oracle::epsilon(dtype)).inverse();
    const Matrix expected = to_eigen(to_tensor(rows, dtype)) * scale.asDiagonal();
    for (int64_t j = 0; j < 3; ++j) {  // each column by itself: the second dwarfs the others
      EXPECT_TRUE(close(to_eigen(output).col(j), expected.col(j), tolerances::of(dtype).products));
    }
  }
}

struct Case {
  at::ScalarType dtype;
  FloorMode floor_mode;
  std::string name;
};

class WhitenerByCase : public testing::TestWithParam<Case> {};

TEST_P(WhitenerByCase, FullEqualsTheFlooredInverseRoot) {
  const auto& [dtype, floor_mode, name] = GetParam();
  const at::Tensor sigma = to_tensor(covariance(oracle::correlated(30, kDim, 1)), dtype);
  const at::Tensor rows = to_tensor(oracle::normal(10, kDim, 2), dtype);
  const double floor = 0.3;
  const double absolute =
      floor_mode == FloorMode::kAbsolute ? floor : oracle::relative_floor(to_eigen(sigma), floor);
  const Whitener whitener = Whitener::full(sigma, floor, floor_mode);
  EXPECT_TRUE(close(whitener.transform(rows),
                    to_eigen(rows) * oracle::floored_inverse_root(to_eigen(sigma), absolute),
                    tolerances::of(dtype).solves));
  EXPECT_NEAR(whitener.floor(), absolute, tolerances::of(dtype).products * absolute);
}

INSTANTIATE_TEST_SUITE_P(, WhitenerByCase,
                         testing::Values(Case{at::kDouble, FloorMode::kAbsolute, "DoubleAbsolute"},
                                         Case{at::kDouble, FloorMode::kRelative, "DoubleRelative"},
                                         Case{at::kFloat, FloorMode::kAbsolute, "FloatAbsolute"},
                                         Case{at::kFloat, FloorMode::kRelative, "FloatRelative"}),
                         [](const auto& info) { return info.param.name; });

TEST(Whitener, FloorsAndTheirCounts) {
  struct Expectation {
    double floor;
    FloorMode mode;
    double absolute;
    int64_t floored;
  };
  for (const Expectation& e : {
           Expectation{0.0, FloorMode::kAbsolute, 0.0, 0},
           Expectation{1e-3, FloorMode::kAbsolute, 1e-3, 1},
           Expectation{5.0, FloorMode::kAbsolute, 5.0, 3},
           Expectation{100.0, FloorMode::kAbsolute, 100.0, 4},
           Expectation{0.0, FloorMode::kRelative, 0.0, 0},
           Expectation{1e-3, FloorMode::kRelative, 1e-3 * kMeanEigenvalue, 1},
           Expectation{0.1, FloorMode::kRelative, 0.1 * kMeanEigenvalue, 2},
       }) {
    const Whitener whitener = Whitener::full(to_tensor(wide_spectrum()), e.floor, e.mode);
    EXPECT_EQ(whitener.mode(), WhiteningMode::kFull);
    EXPECT_EQ(whitener.floored(), e.floored) << "floor " << e.floor;
    EXPECT_NEAR(whitener.floor(), e.absolute, 1e-12 * e.absolute);
    const Matrix root = to_eigen(whitener.transform(to_tensor(Matrix::Identity(4, 4))));
    EXPECT_TRUE(close(root, oracle::floored_inverse_root(wide_spectrum(), e.absolute), 1e-9));
    EXPECT_NEAR(whitener.mean_square(), (root * wide_spectrum() * root).trace() / 4.0, 1e-9);
  }
  EXPECT_EQ(Whitener::none().floored(), 0);
  EXPECT_EQ(Whitener::diagonal(to_vector(Vector::Ones(4))).floor(), 0.0);
}

TEST(Whitener, WhitenedSamplesHaveIdentityCovariance) {
  // The tracker divides by nu - v - 1, so that is the divisor under which it is the identity.
  const int64_t n = 400;
  for (const at::ScalarType dtype : {at::kDouble, at::kFloat}) {
    const at::Tensor rows = to_tensor(oracle::correlated(n, kDim, 1), dtype);
    NormalInverseWishart tracker(kDim);
    tracker.update(rows);
    const at::Tensor centred = rows - tracker.mean().to(dtype);
    const Whitener whitener =
        Whitener::full(tracker.covariance().to(dtype), 0.0, FloorMode::kAbsolute);
    const Matrix white = to_eigen(whitener.transform(centred));
    EXPECT_TRUE(close(white.transpose() * white / double(n - kDim - 1),
                      Matrix::Identity(kDim, kDim), tolerances::of(dtype).solves));
  }
}

TEST(Whitener, RelativeFloorDoesNotSeeTheScaleOfTheGradients) {
  const at::Tensor rows = to_tensor(oracle::normal(7, 4, 1));
  const double scale = 1e-5;
  const auto whiten = [&](double factor, FloorMode mode) {
    const at::Tensor sigma = to_tensor(factor * factor * wide_spectrum());
    return Whitener::full(sigma, 0.1, mode).transform(rows * factor);
  };
  EXPECT_TRUE(close(whiten(scale, FloorMode::kRelative), whiten(1.0, FloorMode::kRelative), 1e-9));
  EXPECT_FALSE(close(whiten(scale, FloorMode::kAbsolute), whiten(1.0, FloorMode::kAbsolute), 0.1));
}

TEST(Whitener, SymmetricRootFollowsARotationOfTheCoordinates) {
  const Matrix q = rotation(4);
  const at::Tensor turned = to_tensor(symmetric(q.transpose() * wide_spectrum() * q));
  const Matrix rows = oracle::normal(7, 4, 1);
  const auto whitener = Whitener::full(to_tensor(wide_spectrum()), 0.01, FloorMode::kRelative);
  const auto in_turned = Whitener::full(turned, 0.01, FloorMode::kRelative);
  EXPECT_TRUE(close(in_turned.transform(to_tensor(rows * q)),
                    to_eigen(whitener.transform(to_tensor(rows))) * q, 1e-9));
}

TEST(Whitener, HalfPrecisionInputGivesFloat32Output) {
  const Whitener full = Whitener::full(to_tensor(wide_spectrum()), 0.1, FloorMode::kRelative);
  const Whitener diagonal = Whitener::diagonal(to_vector(kEigenvalues));
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
    const at::Tensor rows = to_tensor(oracle::normal(7, 4, 1), dtype);
    for (const Whitener& whitener : {Whitener::none(), diagonal, full}) {
      const at::Tensor output = whitener.transform(rows);
      EXPECT_EQ(output.scalar_type(), at::kFloat);
      EXPECT_TRUE(same_bits(output, whitener.transform(rows.to(at::kFloat))));
    }
  }
}

TEST(Whitener, SameInputSameBits) {
  const at::Tensor sigma = to_tensor(wide_spectrum(), at::kFloat);
  const at::Tensor rows = to_tensor(oracle::normal(7, 4, 1), at::kFloat);
  const auto once = Whitener::full(sigma, 0.1, FloorMode::kRelative).transform(rows);
  EXPECT_TRUE(same_bits(Whitener::full(sigma, 0.1, FloorMode::kRelative).transform(rows), once));
}

TEST(Whitener, Refusals) {
  const at::Tensor sigma = to_tensor(wide_spectrum());
  const auto full = [](const at::Tensor& covariance, double floor) {
    return Whitener::full(covariance, floor, FloorMode::kRelative);
  };
  EXPECT_TRUE(refuses<c10::LinAlgError>([&] { full(at::zeros_like(sigma), 0.0); }, {"floor"}));
  EXPECT_TRUE(refuses<c10::LinAlgError>(  // relative to nothing
      [&] { full(at::zeros_like(sigma), 0.1); }, {"floor"}));
  EXPECT_NO_THROW(Whitener::full(at::zeros_like(sigma), 0.1, FloorMode::kAbsolute));
  EXPECT_TRUE(
      refuses<c10::ValueError>([&] { full(sigma.slice(0, 0, 3), 0.1); }, {"covariance", "[3, 4]"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { full(sigma, -0.1); }, {"floor", "-0.1"}));
  EXPECT_TRUE(refuses<c10::ValueError>(
      [&] { full(sigma, std::numeric_limits<double>::quiet_NaN()); }, {"floor", "nan"}));
  EXPECT_TRUE(refuses<c10::ValueError>([&] { Whitener::diagonal(sigma); }, {"stddev", "[4, 4]"}));
  const at::Tensor rows = to_tensor(oracle::normal(7, 3, 1));
  for (const Whitener& whitener : {full(sigma, 0.1), Whitener::diagonal(to_vector(kEigenvalues))}) {
    EXPECT_TRUE(refuses<c10::ValueError>([&] { whitener.transform(rows); },
                                         {"centred", "[n, 4]", "[7, 3]"}));
  }
}

}  // namespace
}  // namespace stableedit
