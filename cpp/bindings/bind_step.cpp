#include "bindings.hpp"
#include "stableedit/step.hpp"

namespace stableedit::bindings {

void bind_step(py::module_& m) {
  const StepOptions defaults;
  m.def("first_order_decrease", no_gil(&first_order_decrease), py::arg("update"), py::arg("keys"),
        py::arg("value_gradients"), R"(
By how much an update lowers the loss to first order, float: positive where it falls.

keys [n, k] and value gradients [n, v] of the loss at them, on the update's device.

Equivalent to:
    -((keys @ update.dense().T) * value_gradients).sum())");
  py::class_<PolyakStep, std::shared_ptr<PolyakStep>>(m, "PolyakStep", R"(
Chooses the step of a turn from its loss L and the decrease s of it that the update of step size 1
promises: share * L / s, and at most `growth` times the median of the last `window` steps.

`copy()` is a snapshot and `restore` goes back to one.)")
      .def(py::init(no_gil([](double share, double growth, int64_t window) {
             return std::make_shared<PolyakStep>(StepOptions{share, growth, window});
           })),
           py::kw_only(), py::arg("share") = defaults.share, py::arg("growth") = defaults.growth,
           py::arg("window") = defaults.window)
      .def("choose", no_gil(&PolyakStep::choose), py::arg("loss"), py::arg("decrease"), R"(
The step for an update of step size 1; `accept` it once it is applied.

Raises ValueError where the loss is positive but `decrease` is not.)")
      .def("accept", no_gil(&PolyakStep::accept), py::arg("step"), "Remember a step.")
      .def("copy", [](const PolyakStep& self) { return std::make_shared<PolyakStep>(self); })
      .def(
          "restore", [](PolyakStep& self, const PolyakStep& snapshot) { self = snapshot; },
          py::arg("snapshot"), "Go back to a `copy()` taken earlier.")
      .def("state_dict", &PolyakStep::state_dict, "All fields as tensors, by name.")
      .def_static(
          "from_state_dict", no_gil([](const StateDict& state) {
            return std::make_shared<PolyakStep>(PolyakStep::from_state_dict(state));
          }),
          py::arg("state"),
          "A copy of the object that gave `state_dict()`; ValueError for a state that is not one.")
      .def_property_readonly("share", [](const PolyakStep& self) { return self.options().share; })
      .def_property_readonly("growth", [](const PolyakStep& self) { return self.options().growth; })
      .def_property_readonly("window", [](const PolyakStep& self) { return self.options().window; })
      .def_property_readonly("recent", &PolyakStep::recent, "Accepted steps, oldest first.");
}

}  // namespace stableedit::bindings
