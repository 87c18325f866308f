#include "bindings.hpp"
#include "stableedit/null_space.hpp"

namespace stableedit::bindings {

void bind_null_space(py::module_& m) {
  py::class_<NullSpace>(m, "NullSpace", R"(
The directions that the keys of ordinary text hardly use: eigenvectors of their second moment
E[h h^T] [k, k] (a mean over keys; upper triangle) with eigenvalues below a threshold, and the
projector P on them. Immutable; keeps the smaller of the basis and its complement.

relative: the threshold is in units of the mean eigenvalue. Decomposes in the moment's dtype, once.
ValueError where no eigenvalue is below the threshold.)")
      .def(py::init(no_gil([](const at::Tensor& moment, double threshold, bool relative) {
             return NullSpace(moment, threshold, relative);
           })),
           py::arg("moment"), py::arg("threshold"), py::kw_only(), py::arg("relative") = false)
      .def("project", no_gil(&NullSpace::project), py::arg("keys"), R"(
H P, [n, k] in the dtype of the keys (float32 at least).

Equivalent to:
    values, vectors = torch.linalg.eigh(moment)
    kept = vectors[:, values < threshold]
    keys @ kept @ kept.T)")
      .def("to", no_gil(&NullSpace::to), py::arg("dtype"),
           "The same with its basis in float32 or float64: what it is stored and computed in.")
      .def("state_dict", &NullSpace::state_dict,
           "All fields as tensors, by name; look, do not write.")
      .def_static(
          "from_state_dict", no_gil(&NullSpace::from_state_dict), py::arg("state"),
          "A copy of the object that gave `state_dict()`; ValueError for a state that is not one.")
      .def_property_readonly("dim", &NullSpace::dim)
      .def_property_readonly("rank", &NullSpace::rank,
                             "Of P, 1 to k: how many directions are free to edit.")
      .def_property_readonly("threshold", &NullSpace::threshold, "In the units of the moment.")
      .def_property_readonly("basis", &NullSpace::basis,
                             "Orthonormal columns, [k, min(rank, k - rank)].")
      .def_property_readonly("complement", &NullSpace::complement,
                             "Whether `basis` spans what P takes away.");
}

}  // namespace stableedit::bindings
