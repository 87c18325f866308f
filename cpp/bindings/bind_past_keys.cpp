#include "bindings.hpp"
#include "stableedit/past_keys.hpp"

namespace stableedit::bindings {

void bind_past_keys(py::module_& m) {
  py::class_<PastKeys, std::shared_ptr<PastKeys>>(m, "PastKeys", R"(
Second moment C = sum of h h^T over the keys of earlier turns of one module, and products with
(weight C + ridge I)^(-1).

rank None keeps C exactly (k x k); a number bounds the memory to 2 rank x k by Robust Frequent
Directions. `copy()` is an O(1) snapshot and `restore` goes back to one.)")
      .def(py::init(no_gil([](int64_t dim, std::optional<int64_t> rank) {
             TORCH_CHECK_VALUE(!rank || *rank > 0, "rank must be at least 1 or None, but it is ",
                               *rank);
             return std::make_shared<PastKeys>(dim, rank.value_or(0));
           })),
           py::arg("dim"), py::arg("rank") = py::none())
      .def_static("seeded", no_gil([](const at::Tensor& moment, double weight, int64_t count) {
                    return std::make_shared<PastKeys>(PastKeys::seeded(moment, weight, count));
                  }),
                  py::arg("moment"), py::arg("weight") = 1.0, py::kw_only(), py::arg("count") = 1,
                  R"(
Exact, and begun with C = weight * moment [k, k] (upper triangle), as MEMIT has it.

In the moment's dtype, float32 at least. count: how many keys it stands for.)")
      .def("update", no_gil(&PastKeys::update), py::arg("keys"),
           "Fold in the keys of a turn, [n, k].")
      .def("solve", no_gil(&PastKeys::solve), py::arg("keys"), py::kw_only(), py::arg("weight"),
           py::arg("ridge"), R"(
H (weight C + ridge I)^(-1), [n, k].

Equivalent to:
    torch.linalg.solve(weight * C + ridge * torch.eye(k), keys.T).T)")
      .def("copy", [](const PastKeys& self) { return std::make_shared<PastKeys>(self); })
      .def(
          "restore", [](PastKeys& self, const PastKeys& snapshot) { self = snapshot; },
          py::arg("snapshot"), "Go back to a `copy()` taken earlier.")
      .def("state_dict", &PastKeys::state_dict,
           "All fields as tensors, by name; look, do not write.")
      .def_static(
          "from_state_dict", no_gil([](const StateDict& state) {
            return std::make_shared<PastKeys>(PastKeys::from_state_dict(state));
          }),
          py::arg("state"),
          "A copy of the object that gave `state_dict()`; ValueError for a state that is not one.")
      .def_property_readonly("dim", &PastKeys::dim)
      .def_property_readonly("rank",
                             [](const PastKeys& self) {
                               return self.rank() > 0 ? std::optional<int64_t>(self.rank())
                                                      : std::nullopt;
                             })
      .def_property_readonly("count", &PastKeys::count)
      .def_property_readonly("second_moment", no_gil(&PastKeys::second_moment),
                             "C or its sketch, [k, k] float64.")
      .def_property_readonly("shrinkage", &PastKeys::shrinkage)
      .def_property_readonly("factorisations", &PastKeys::factorisations);
}

}  // namespace stableedit::bindings
