#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace stableedit {

/// The state of an object as named tensors, as torch has it. Counts and options are tensors of
/// dimension 0 (int64, float64), so that every number survives bit for bit.
///
/// `state_dict()` shares memory with the object: look, do not write. `from_state_dict()` copies,
/// leaves each tensor on its device, and throws ValueError for a field that is missing, unknown, of
/// another shape or dtype, or not finite. An object that was restored goes on bit for bit like the
/// one that was saved, on the same machine.
///
/// Concurrency: a snapshot. Objects replace their tensors and never write into them, so that one
/// thread may save a state while another goes on with the object it came from.
using StateDict = std::map<std::string, at::Tensor>;

}  // namespace stableedit
