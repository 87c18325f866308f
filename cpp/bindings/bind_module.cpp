#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "The mathematics of StableEdit (libstableedit), bound to torch tensors.";
  stableedit::bindings::bind_statistics(m);
  stableedit::bindings::bind_null_space(m);
  stableedit::bindings::bind_past_keys(m);
  stableedit::bindings::bind_update(m);
  stableedit::bindings::bind_step(m);
  stableedit::bindings::bind_serialization(m);
}
