#pragma once

// The tests' second opinion: every noun of the library once more, in float64 Eigen, straight from
// the formulas of the papers and as slowly as they allow. Nothing here calls ATen for mathematics.
// At the end: random data, the way from tensors to Eigen and back, and a catcher of exceptions.

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace oracle {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;

// --- mathematics ---------------------------------------------------------------------------------

inline Matrix concatenate(const std::vector<Matrix>& pieces) {
  int64_t rows = 0;
  for (const Matrix& piece : pieces) rows += piece.rows();
  Matrix whole(rows, pieces.front().cols());
  rows = 0;
  for (const Matrix& piece : pieces) {
    whole.middleRows(rows, piece.rows()) = piece;
    rows += piece.rows();
  }
  return whole;
}

/// Moments of rows that are all at hand, in two passes.
struct Moments {
  explicit Moments(const Matrix& rows)
      : count(rows.rows()),
        mean(count > 0 ? Vector(rows.colwise().mean().transpose()) : Vector::Zero(rows.cols())),
        m2((rows.rowwise() - mean.transpose()).colwise().squaredNorm().transpose()) {}

  Vector variance() const {
    return count < 2 ? Vector(Vector::Zero(m2.size())) : Vector(m2 / double(count - 1));
  }
  Vector stddev() const { return variance().cwiseSqrt(); }

  int64_t count;
  Vector mean;
  Vector m2;
};

/// The posterior (m, kappa, Psi, nu), batch after batch, exactly as docs/method.md section 2 writes
/// it. (The library keeps the statistics of the data and applies the prior on reading.)
struct Niw {
  explicit Niw(int64_t dim, double kappa0 = 0.0, double psi0 = 0.0, double nu0 = 0.0)
      : m(Vector::Zero(dim)), kappa(kappa0), psi(psi0 * Matrix::Identity(dim, dim)), nu(nu0) {}

  void update(const Matrix& batch) {
    const double n = double(batch.rows());
    if (n == 0.0) return;
    const Vector mean = batch.colwise().mean().transpose();
    const Matrix centred = batch.rowwise() - mean.transpose();
    const Vector delta = mean - m;
    psi += centred.transpose() * centred + kappa * n / (kappa + n) * delta * delta.transpose();
    m += n / (kappa + n) * delta;
    kappa += n;
    nu += n;
  }

  bool has_covariance() const { return nu > double(m.size()) + 1.0; }
  Matrix covariance() const { return psi / (nu - double(m.size()) - 1.0); }

  Vector m;
  double kappa;
  Matrix psi;
  double nu;
};

/// U max(Lambda, floor)^(-1/2) U^T with an absolute floor.
inline Matrix floored_inverse_root(const Matrix& sigma, double floor) {
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(sigma);
  const Vector roots = solver.eigenvalues().cwiseMax(floor).cwiseSqrt().cwiseInverse();
  return solver.eigenvectors() * roots.asDiagonal() * solver.eigenvectors().transpose();
}

/// A relative floor in the units of sigma: a multiple of the mean eigenvalue.
inline double relative_floor(const Matrix& sigma, double floor) {
  return floor * sigma.trace() / double(sigma.rows());
}

inline Matrix diagonal_normalize(const Matrix& rows, const Moments& moments, double eps) {
  const Vector scale = (moments.stddev().array() + eps).inverse();
  return (rows.rowwise() - moments.mean.transpose()) * scale.asDiagonal();
}

/// D = (H^T H + ridge I_k)^(-1) H^T V, `[k, v]`, in the primal form whatever n is.
inline Matrix ridge(const Matrix& keys, const Matrix& targets, double ridge) {
  const Matrix system =
      keys.transpose() * keys + ridge * Matrix::Identity(keys.cols(), keys.cols());
  return system.fullPivLu().solve(keys.transpose() * targets);
}

/// The least-squares solution of smallest norm, H^+ V.
inline Matrix minimum_norm(const Matrix& keys, const Matrix& targets) {
  return keys.completeOrthogonalDecomposition().solve(targets);
}

enum class Mode { kNone, kDiagonal, kFull };

/// StableEdit's update of one module: keeps the whole stream and starts from scratch every turn.
struct ModuleEditor {
  Mode mode;
  double floor;  // relative to the mean eigenvalue
  double step_size;
  double ridge;
  double eps;  // of the dtype that the library computes in
  std::vector<Matrix> seen_keys = {};
  std::vector<Matrix> seen_gradients = {};

  void observe(const Matrix& keys, const Matrix& gradients) {
    seen_keys.push_back(keys);
    seen_gradients.push_back(gradients);
  }

  Matrix normalized_gradients(const Matrix& gradients) const {
    if (mode == Mode::kNone) return gradients;
    Niw niw(gradients.cols());
    for (const Matrix& batch : seen_gradients) niw.update(batch);
    if (mode == Mode::kFull && niw.has_covariance()) {
      const Matrix sigma = niw.covariance();
      return (gradients.rowwise() - niw.m.transpose()) *
             floored_inverse_root(sigma, relative_floor(sigma, floor));
    }
    return diagonal_normalize(gradients, Moments(concatenate(seen_gradients)), eps);
  }

  /// The change of a `[v, k]` weight, D^T.
  Matrix update(const Matrix& keys, const Matrix& gradients) const {
    const Matrix normalized_keys =
        mode == Mode::kNone ? keys : diagonal_normalize(keys, Moments(concatenate(seen_keys)), eps);
    Matrix targets = normalized_gradients(gradients);
    for (int64_t i = 0; i < targets.rows(); ++i) {
      targets.row(i) *= -step_size * normalized_keys.row(i).squaredNorm();
    }
    return oracle::ridge(keys, targets, ridge).transpose();
  }
};

/// The eps of a diagonal whitener for an input of this dtype.
inline double epsilon(at::ScalarType dtype) {
  return dtype == at::kDouble ? std::numeric_limits<double>::epsilon()
                              : double(std::numeric_limits<float>::epsilon());
}

// --- data ----------------------------------------------------------------------------------------

/// Independent standard normal entries; the seed is the whole state.
inline Matrix normal(int64_t rows, int64_t columns, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution;
  return Matrix::NullaryExpr(rows, columns, [&] { return distribution(generator); });
}

/// Rows with a mean and correlated dimensions, condition number of their covariance about 100.
inline Matrix correlated(int64_t rows, int64_t columns, unsigned seed) {
  const Matrix rotation = normal(columns, columns, 4711).householderQr().householderQ();
  const Vector scale = Vector::LinSpaced(columns, 0.3, 3.0);
  const Vector mean = Vector::LinSpaced(columns, -1.0, 2.0);
  return (normal(rows, columns, seed) * scale.asDiagonal() * rotation.transpose()).rowwise() +
         mean.transpose();
}

// --- tensors -------------------------------------------------------------------------------------

inline at::Tensor to_tensor(const Matrix& matrix, at::ScalarType dtype = at::kDouble) {
  at::Tensor tensor = at::empty({matrix.rows(), matrix.cols()}, at::kDouble);
  using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::Map<RowMajor>(tensor.data_ptr<double>(), matrix.rows(), matrix.cols()) = matrix;
  return tensor.to(dtype);
}

inline at::Tensor to_vector(const Vector& vector, at::ScalarType dtype = at::kDouble) {
  return to_tensor(vector, dtype).squeeze(1);
}

/// A matrix as it is, a vector as one column. Values are exact for every dtype.
inline Matrix to_eigen(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().to(at::kCPU, at::kDouble).contiguous();
  const int64_t columns = wide.dim() == 2 ? wide.size(1) : 1;
  using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  return Eigen::Map<const RowMajor>(wide.data_ptr<double>(), wide.size(0), columns);
}

/// Same dtype, shape and values, and no NaN: all that tells two results apart except the sign of 0.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.equal(b);
}

// --- exceptions ----------------------------------------------------------------------------------

/// The message of the `Error` that the call must throw.
template <typename Error, typename Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "an exception of another type: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no exception was thrown";
  return "";
}

/// For EXPECT_TRUE: the call throws `Error`, and its message contains all of the given words.
template <typename Error, typename Call>
testing::AssertionResult refuses(Call&& call, const std::vector<std::string>& words) {
  const std::string message = message_of<Error>(std::forward<Call>(call));
  for (const std::string& word : words) {
    if (message.find(word) == std::string::npos) {
      return testing::AssertionFailure() << "no '" << word << "' in: " << message;
    }
  }
  return testing::AssertionSuccess();
}

/// Names parameterised tests by dtype.
inline std::string dtype_name(const testing::TestParamInfo<at::ScalarType>& info) {
  return c10::toString(info.param);
}

}  // namespace oracle
