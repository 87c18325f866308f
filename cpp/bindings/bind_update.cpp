#include <pybind11/stl.h>

#include "bindings.hpp"
#include "stableedit/contribution.hpp"
#include "stableedit/master_weight.hpp"
#include "stableedit/module_editor.hpp"
#include "stableedit/ridge.hpp"

namespace stableedit::bindings {
namespace {

RidgeForm ridge_form(const std::string& name) {
  if (name == "auto") return RidgeForm::kAuto;
  if (name == "primal") return RidgeForm::kPrimal;
  TORCH_CHECK_VALUE(name == "dual", "form must be 'auto', 'primal' or 'dual', not '", name, "'");
  return RidgeForm::kDual;
}

void bind_low_rank(py::module_& m) {
  py::class_<LowRankUpdate>(m, "LowRankUpdate", R"(
A change of a weight in factored form: left [v, r] @ right [r, k]. Immutable.

Equivalent to:
    weight += update.dense()    # update.add_to(weight), without the [v, k] temporary)")
      .def(py::init(no_gil([](at::Tensor left, at::Tensor right) {
             return LowRankUpdate(std::move(left), std::move(right));
           })),
           py::arg("left"), py::arg("right"))
      .def_property_readonly("left", &LowRankUpdate::left)
      .def_property_readonly("right", &LowRankUpdate::right)
      .def_property_readonly("rank", &LowRankUpdate::rank)
      .def("dense", no_gil(&LowRankUpdate::dense), "The whole matrix, [v, k].")
      .def("add_to",
           no_gil([](const LowRankUpdate& self, const at::Tensor& weight,
                     const std::string& layout) { self.add_to(weight, weight_layout(layout)); }),
           py::arg("weight"), py::arg("layout") = "linear",
           "Add to a weight in place; layout 'linear' is [v, k], 'conv1d' is [k, v].")
      .def("subtract_from",
           no_gil(
               [](const LowRankUpdate& self, const at::Tensor& weight, const std::string& layout) {
                 self.subtract_from(weight, weight_layout(layout));
               }),
           py::arg("weight"), py::arg("layout") = "linear", "Subtract from a weight in place.")
      .def("norm", no_gil(&LowRankUpdate::norm), "Frobenius norm, from r x r products.")
      .def("inner", no_gil(&LowRankUpdate::inner), py::arg("other"), "Frobenius inner product.")
      .def("scaled", no_gil(&LowRankUpdate::scaled), py::arg("factor"),
           "This many times the change.")
      .def("select", no_gil(&LowRankUpdate::select), py::arg("rows"),
           "The share of the given rows, int64 [m].");
}

void bind_ridge(py::module_& m) {
  m.def("solve_ridge",
        no_gil([](const at::Tensor& keys, const at::Tensor& targets, double ridge,
                  const std::string& form, const std::shared_ptr<PastKeys>& past_keys,
                  double past_key_weight) {
          if (past_keys == nullptr) return solve_ridge(keys, targets, ridge, ridge_form(form));
          return solve_ridge(keys, targets, ridge, *past_keys, past_key_weight);
        }),
        py::arg("keys"), py::arg("targets"), py::arg("ridge"), py::arg("form") = "auto",
        py::kw_only(), py::arg("past_keys") = nullptr, py::arg("past_key_weight") = 0.0, R"(
D = (H^T H + ridge I)^(-1) H^T V, [k, v], from keys H [n, k] and targets V [n, v].

form: 'primal' (k x k system), 'dual' (n x n) or 'auto' (the smaller). Cholesky in float64; with
ridge = 0 and dependent keys the minimum-norm solution. With past_keys, which is always dual,
past_key_weight * C is added to the system.

Equivalent to:
    torch.linalg.solve(H.T @ H + past_key_weight * C + ridge * torch.eye(k), H.T @ V))");
  m.def("ridge_update",
        no_gil([](const at::Tensor& keys, const at::Tensor& targets, double ridge,
                  const std::shared_ptr<PastKeys>& past_keys, double past_key_weight) {
          if (past_keys == nullptr) return ridge_update(keys, targets, ridge);
          return ridge_update(keys, targets, ridge, *past_keys, past_key_weight);
        }),
        py::arg("keys"), py::arg("targets"), py::arg("ridge"), py::kw_only(),
        py::arg("past_keys") = nullptr, py::arg("past_key_weight") = 0.0,
        "The same solution as a LowRankUpdate of a [v, k] weight (D^T), one row an answer token.");
}

void bind_contribution(py::module_& m) {
  m.def("contribution",
        no_gil([](const LowRankUpdate& update, const at::Tensor& owned, std::optional<double> ridge,
                  const std::optional<at::Tensor>& keys) {
          TORCH_CHECK_VALUE(ridge.has_value() != keys.has_value(),
                            "contribution needs either ridge (an update without past keys) or keys "
                            "(an update with past keys)");
          return ridge ? contribution(update, owned, *ridge) : contribution(update, owned, *keys);
        }),
        py::arg("update"), py::arg("owned"), py::kw_only(), py::arg("ridge") = py::none(),
        py::arg("keys") = py::none(), R"(
What the answer tokens `owned`, [n] bool, contributed to an update of `ridge_update`: the difference
to the update of the other tokens alone, as a LowRankUpdate with one row an owned token.

Give `ridge`, which the update was solved with, or, where past keys took part, the turn's `keys`
[n, k] instead.

Equivalent to:
    update.dense() - ridge_update(keys[~owned], targets[~owned], ridge).dense())");
}

void bind_module_editor(py::module_& m) {
  const EditOptions defaults;
  py::class_<ModuleEditor>(m, "ModuleEditor", R"(
(keys, value gradients) of a turn -> LowRankUpdate of one module's weight. StableEdit, Algorithm 1:

    V_i = - step_size * ||h_hat_i||^2 * g_hat_i
    D   = (H^T H + past_key_weight C + ridge I)^(-1) H^T V,     W <- W + D^T

C is the second moment of `past_keys`, which only `edit` adds to; its weight is 0 unless given. It never touches a weight. Editors that share a normalizer pool their statistics.)")
      .def(py::init(no_gil([](std::shared_ptr<LifelongNormalizer> normalizer, double step_size,
                              double ridge, double past_key_weight,
                              std::shared_ptr<PastKeys> past_keys) {
             return ModuleEditor(std::move(normalizer),
                                 EditOptions{step_size, ridge, past_key_weight},
                                 std::move(past_keys));
           })),
           py::arg("normalizer"), py::kw_only(), py::arg("step_size") = defaults.step_size,
           py::arg("ridge") = defaults.ridge, py::arg("past_key_weight") = defaults.past_key_weight,
           py::arg("past_keys") = nullptr)
      .def(py::init(no_gil([](int64_t key_dim, int64_t value_dim, double step_size, double ridge,
                              WhiteningOptions whitening, NiwPrior prior, double past_key_weight) {
             return ModuleEditor(key_dim, value_dim, NormalizerOptions{whitening, prior},
                                 EditOptions{step_size, ridge, past_key_weight});
           })),
           py::arg("key_dim"), py::arg("value_dim"), py::kw_only(),
           py::arg("step_size") = defaults.step_size, py::arg("ridge") = defaults.ridge,
           py::arg("whitening") = WhiteningOptions{}, py::arg("prior") = NiwPrior{},
           py::arg("past_key_weight") = defaults.past_key_weight)
      .def("edit", no_gil(&ModuleEditor::edit), py::arg("keys"), py::arg("value_gradients"),
           "Observe keys [n, k] and value gradients [n, v], compute their update and add the keys "
           "to "
           "past_keys.")
      .def("compute_update",
           no_gil([](ModuleEditor& self, const at::Tensor& keys, const at::Tensor& gradients,
                     const std::optional<std::string>& mode) {
             return self.compute_update(keys, gradients, optional_mode(mode));
           }),
           py::arg("keys"), py::arg("value_gradients"), py::arg("mode") = py::none(),
           "The update alone, from statistics that have observed the turn.")
      .def("targets",
           no_gil([](ModuleEditor& self, const at::Tensor& keys, const at::Tensor& gradients,
                     const std::optional<std::string>& mode) {
             return self.targets(keys, gradients, optional_mode(mode));
           }),
           py::arg("keys"), py::arg("value_gradients"), py::arg("mode") = py::none(),
           "Ridge targets V, [n, v].")
      .def_property_readonly("normalizer",
                             [](ModuleEditor& self) { return self.shared_normalizer(); })
      .def_property_readonly("past_keys", &ModuleEditor::past_keys)
      .def_property_readonly(
          "past_key_weight",
          [](const ModuleEditor& self) { return self.options().past_key_weight; })
      .def_property_readonly("step_size",
                             [](const ModuleEditor& self) { return self.options().step_size; })
      .def_property_readonly("ridge",
                             [](const ModuleEditor& self) { return self.options().ridge; });
}

void bind_master_weight(py::module_& m) {
  py::class_<MasterWeight>(m, "MasterWeight", R"(
A live weight with its float32 master: updates go to the master, the live weight is the master
rounded once. float32 and float64 weights are their own master.

exact_revert keeps what rounding takes away, so that `revert` restores the bits in any order.)")
      .def(py::init(no_gil([](at::Tensor live, const std::string& layout, bool exact_revert) {
             return MasterWeight(std::move(live), weight_layout(layout), exact_revert);
           })),
           py::arg("live"), py::arg("layout") = "linear", py::kw_only(),
           py::arg("exact_revert") = true)
      .def("apply", no_gil(&MasterWeight::apply), py::arg("update"), "W <- W + update.")
      .def("revert", no_gil(&MasterWeight::revert), py::arg("update"), "W <- W - update.")
      .def("check", no_gil(&MasterWeight::check), py::arg("update"),
           "Raise what `apply` would raise, changing nothing.")
      .def("clone", no_gil(&MasterWeight::clone), "A copy of weight and master.")
      .def("restore", no_gil(&MasterWeight::restore), py::arg("snapshot"), "Go back to a clone.")
      .def_property_readonly("live", &MasterWeight::live)
      .def_property_readonly("master", &MasterWeight::master);
}

}  // namespace

WeightLayout weight_layout(const std::string& name) {
  if (name == "linear") return WeightLayout::kLinear;
  TORCH_CHECK_VALUE(name == "conv1d",
                    "layout must be 'linear' ([v, k]) or 'conv1d' ([k, v]), not '", name, "'");
  return WeightLayout::kConv1D;
}

void bind_update(py::module_& m) {
  bind_low_rank(m);
  bind_ridge(m);
  bind_contribution(m);
  bind_module_editor(m);
  bind_master_weight(m);
}

}  // namespace stableedit::bindings
