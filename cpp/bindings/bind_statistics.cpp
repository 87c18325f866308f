#include <pybind11/stl.h>

#include "bindings.hpp"
#include "stableedit/normalizer.hpp"

namespace stableedit::bindings {
namespace {

constexpr const char* kStateDict =
    "The whole state as named tensors, which share memory with this object: do not write to them.";
constexpr const char* kFromStateDict =
    "A copy of the object that gave `state_dict()`; ValueError for a state that is not one.";

void bind_moments(py::module_& m) {
  py::class_<RunningMoments>(m, "RunningMoments", R"(
Running mean and per-dimension M2 of a stream of row vectors, in float64.

Pieces in any order, or merged trackers, give the moments of the whole stream. `copy()` is an O(1)
snapshot. `unbiased_batches` adds n * (unbiased batch variance) to M2, as the published ULTRAEDIT
code does, which depends on how the stream is cut.)")
      .def(py::init(no_gil([](int64_t dim, bool unbiased_batches) {
             return RunningMoments(dim, unbiased_batches);
           })),
           py::arg("dim"), py::kw_only(), py::arg("unbiased_batches") = false)
      .def("update", no_gil(&RunningMoments::update), py::arg("batch"),
           "Fold in a batch [n, dim] of any floating dtype; n = 0 changes nothing.")
      .def("merge", no_gil(&RunningMoments::merge), py::arg("other"),
           "Fold in everything `other` has seen.")
      .def("state_dict", &RunningMoments::state_dict, kStateDict)
      .def_static("from_state_dict", no_gil(&RunningMoments::from_state_dict), py::arg("state"),
                  kFromStateDict)
      .def("copy", [](const RunningMoments& self) { return self; })
      .def_property_readonly("dim", &RunningMoments::dim)
      .def_property_readonly("count", &RunningMoments::count)
      .def("mean", &RunningMoments::mean, "Mean, [dim] float64.")
      .def("m2", &RunningMoments::m2, "Sum of squared deviations, [dim] float64.")
      .def("variance", no_gil(&RunningMoments::variance), "M2 / (count - 1), [dim] float64.")
      .def("stddev", no_gil(&RunningMoments::stddev), "Root of the variance, [dim] float64.");
}

void bind_niw(py::module_& m) {
  py::class_<NiwPrior>(m, "NiwPrior", "Prior (mean 0, kappa, psi * I, nu) of the tracker.")
      .def(py::init([](double kappa, double psi, double nu) { return NiwPrior{kappa, psi, nu}; }),
           py::kw_only(), py::arg("kappa") = 0.0, py::arg("psi") = 0.0, py::arg("nu") = 0.0)
      .def_readonly("kappa", &NiwPrior::kappa)
      .def_readonly("psi", &NiwPrior::psi)
      .def_readonly("nu", &NiwPrior::nu)
      .def("__repr__", [](const NiwPrior& self) {
        return py::str("NiwPrior(kappa={!r}, psi={!r}, nu={!r})")
            .format(self.kappa, self.psi, self.nu);
      });

  py::class_<NormalInverseWishart>(m, "NormalInverseWishart", R"(
Normal-Inverse-Wishart tracker (m, kappa, Psi, nu) of value gradients: StableEdit, Algorithm 1.

Float64 sufficient statistics with the prior applied on reading, so updates and merges are
associative and commutative. `copy()` is an O(1) snapshot.)")
      .def(py::init(no_gil(
               [](int64_t dim, NiwPrior prior) { return NormalInverseWishart(dim, prior); })),
           py::arg("dim"), py::arg("prior") = NiwPrior{})
      .def("update",
           no_gil([](NormalInverseWishart& self, const at::Tensor& batch) { self.update(batch); }),
           py::arg("batch"), "Fold in a batch [n, v]; n = 0 changes nothing.")
      .def("merge", no_gil(&NormalInverseWishart::merge), py::arg("other"),
           "Fold in everything `other` has seen; dimension and prior must agree.")
      .def("state_dict", &NormalInverseWishart::state_dict, kStateDict)
      .def_static("from_state_dict", no_gil(&NormalInverseWishart::from_state_dict),
                  py::arg("state"), kFromStateDict)
      .def("copy", [](const NormalInverseWishart& self) { return self; })
      .def_property_readonly("dim", &NormalInverseWishart::dim)
      .def_property_readonly("count", &NormalInverseWishart::count)
      .def_property_readonly("kappa", &NormalInverseWishart::kappa)
      .def_property_readonly("nu", &NormalInverseWishart::nu)
      .def_property_readonly("prior", &NormalInverseWishart::prior)
      .def("mean", no_gil(&NormalInverseWishart::mean), "Posterior mean m, [v] float64.")
      .def("psi", no_gil(&NormalInverseWishart::psi), "Posterior scatter Psi, [v, v] float64.")
      .def("has_covariance", &NormalInverseWishart::has_covariance, "True once nu > v + 1.")
      .def("covariance", no_gil(&NormalInverseWishart::covariance),
           "Psi / (nu - v - 1), [v, v] float64; ValueError while nu <= v + 1.");
}

void bind_whitening(py::module_& m) {
  const WhiteningOptions defaults;
  py::class_<WhiteningOptions>(m, "WhiteningOptions", R"(
mode: 'full', 'diagonal' or 'none'. floor: lower bound on the eigenvalues of the covariance,
absolute or relative to their mean. refresh: reuse a decomposition until the sample count has grown
by this fraction (0: decompose every turn). drift_limit: decompose anyway for a turn that would be
whitened to a mean square more than this factor above what the covariance lets expect. centred: True
whitens about the running mean and weights targets by their keys, as published; False whitens by the
second moment about zero and does not weight, so that an update never raises the loss to first order.)")
      .def(py::init(no_gil([](const std::string& mode, double floor, const std::string& floor_mode_,
                              double refresh, double drift_limit, bool centred) {
             const WhiteningOptions options{
                 whitening_mode(mode), floor,  floor_mode(floor_mode_), refresh,
                 drift_limit,          centred};
             options.check();
             return options;
           })),
           py::kw_only(), py::arg("mode") = "full", py::arg("floor") = defaults.floor,
           py::arg("floor_mode") = "relative", py::arg("refresh") = defaults.refresh,
           py::arg("drift_limit") = defaults.drift_limit, py::arg("centred") = defaults.centred)
      .def_property_readonly("mode",
                             [](const WhiteningOptions& self) { return to_string(self.mode); })
      .def_readonly("floor", &WhiteningOptions::floor)
      .def_readonly("refresh", &WhiteningOptions::refresh)
      .def_readonly("drift_limit", &WhiteningOptions::drift_limit)
      .def_readonly("centred", &WhiteningOptions::centred)
      .def_property_readonly(
          "floor_mode", [](const WhiteningOptions& self) { return to_string(self.floor_mode); })
      .def("__repr__", [](const WhiteningOptions& self) {
        return py::str(
                   "WhiteningOptions(mode={!r}, floor={!r}, floor_mode={!r}, refresh={!r}, "
                   "drift_limit={!r}, centred={!r})")
            .format(to_string(self.mode), self.floor, to_string(self.floor_mode), self.refresh,
                    self.drift_limit, self.centred);
      });

  py::class_<Whitener>(m, "Whitener", "One fixed whitening transform of centred value gradients.")
      .def_static("none", &Whitener::none)
      .def_static("diagonal", no_gil(&Whitener::diagonal), py::arg("stddev"),
                  "Divide by stddev [v] + eps of the input's dtype.")
      .def_static("full",
                  no_gil([](const at::Tensor& covariance, double floor, const std::string& mode) {
                    return Whitener::full(covariance, floor, floor_mode(mode));
                  }),
                  py::arg("covariance"), py::kw_only(), py::arg("floor") = 0.1,
                  py::arg("floor_mode") = "relative",
                  "U max(Lambda, floor)^(-1/2) U^T of a covariance [v, v].")
      .def("transform", no_gil(&Whitener::transform), py::arg("centred"),
           "[n, v] centred value gradients -> [n, v] whitened.")
      .def("state_dict", &Whitener::state_dict, kStateDict)
      .def_static("from_state_dict", no_gil(&Whitener::from_state_dict), py::arg("state"),
                  kFromStateDict)
      .def_property_readonly("mode", [](const Whitener& self) { return to_string(self.mode()); })
      .def_property_readonly("floor", &Whitener::floor)
      .def_property_readonly("floored", &Whitener::floored)
      .def_property_readonly("mean_square", &Whitener::mean_square);
}

void bind_normalizer(py::module_& m) {
  using Pieces = std::vector<at::Tensor>;
  py::class_<LifelongNormalizer, std::shared_ptr<LifelongNormalizer>>(m, "LifelongNormalizer", R"(
Lifelong Normalization of one edited module, or of all modules of one shape when pooled: running
key moments, value moments and, for full whitening, the Normal-Inverse-Wishart tracker.

Fold a turn in with `observe` before normalising it. `copy()` is an O(1) snapshot and `restore`
goes back to one.)")
      .def(py::init(no_gil([](int64_t key_dim, int64_t value_dim, WhiteningOptions whitening,
                              NiwPrior prior, bool unbiased_batches) {
             return std::make_shared<LifelongNormalizer>(
                 key_dim, value_dim, NormalizerOptions{whitening, prior, unbiased_batches});
           })),
           py::arg("key_dim"), py::arg("value_dim"), py::kw_only(),
           py::arg("whitening") = WhiteningOptions{}, py::arg("prior") = NiwPrior{},
           py::arg("unbiased_batches") = false)
      .def(
          "observe",
          no_gil([](LifelongNormalizer& self, const at::Tensor& keys, const at::Tensor& gradients) {
            self.observe(keys, gradients);
          }),
          py::arg("keys"), py::arg("value_gradients"),
          "Fold in keys [n, k] and value gradients [n, v]; ValueError leaves everything as it was.")
      .def("observe",
           no_gil([](LifelongNormalizer& self, const Pieces& keys, const Pieces& gradients) {
             self.observe(keys, gradients);
           }),
           py::arg("keys"), py::arg("value_gradients"),
           "The same for several batches (the modules of a pool), with one scatter product.")
      .def("merge", no_gil(&LifelongNormalizer::merge), py::arg("other"))
      .def(
          "copy",
          [](const LifelongNormalizer& self) { return std::make_shared<LifelongNormalizer>(self); })
      .def(
          "restore",
          [](LifelongNormalizer& self, const LifelongNormalizer& snapshot) { self = snapshot; },
          py::arg("snapshot"), "Go back to a `copy()` taken earlier.")
      .def("normalize_keys", no_gil(&LifelongNormalizer::normalize_keys), py::arg("keys"),
           "(h - mean) / (std + eps), [n, k].")
      .def("normalize_value_gradients",
           no_gil([](LifelongNormalizer& self, const at::Tensor& gradients,
                     const std::optional<std::string>& mode) {
             return self.normalize_value_gradients(gradients, optional_mode(mode));
           }),
           py::arg("value_gradients"), py::arg("mode") = py::none(),
           "Whitened value gradients, [n, v]; `mode` overrides the configured one downwards.")
      .def("effective_mode",
           no_gil([](const LifelongNormalizer& self, const std::optional<std::string>& mode) {
             return to_string(self.effective_mode(optional_mode(mode)));
           }),
           py::arg("mode") = py::none(),
           "The whitening that would be used now; full needs nu > v + 1.")
      .def_property_readonly("key_dim", &LifelongNormalizer::key_dim)
      .def_property_readonly("value_dim", &LifelongNormalizer::value_dim)
      .def_property_readonly("count", &LifelongNormalizer::count)
      .def_property_readonly("key_moments", &LifelongNormalizer::key_moments)
      .def_property_readonly("value_moments", &LifelongNormalizer::value_moments)
      .def_property_readonly("value_tracker", &LifelongNormalizer::value_tracker)
      .def("state_dict", &LifelongNormalizer::state_dict, kStateDict)
      .def_static(
          "from_state_dict", no_gil([](const StateDict& state) {
            return std::make_shared<LifelongNormalizer>(LifelongNormalizer::from_state_dict(state));
          }),
          py::arg("state"), kFromStateDict)
      .def_property_readonly("whitener", &LifelongNormalizer::whitener)
      .def_property_readonly("decompositions", &LifelongNormalizer::decompositions);
}

}  // namespace

void bind_statistics(py::module_& m) {
  bind_moments(m);
  bind_niw(m);
  bind_whitening(m);
  bind_normalizer(m);
}

}  // namespace stableedit::bindings
