#pragma once

/// \file
/// Everything at once. Start reading at module_editor.hpp.

/// \mainpage
/// Lifelong editing of language models over LibTorch. Start reading at stableedit::ModuleEditor;
/// docs/cpp.md leads from nothing to a running server.
///
/// Errors are exceptions of c10 with one sentence each, `what_without_backtrace()`:
/// c10::ValueError, c10::TypeError and c10::IndexError for what a caller passed in,
/// c10::LinAlgError for numerical failure. After an error every object is as it was before the
/// call.
///
/// Concurrency is stated for each class. Where nothing is said of a free function, it has no state
/// and any number of threads may call it. A struct of options is like a container of the standard
/// library: many may read it, or one may write. Tensors that are passed in must not be written to
/// during the call. Nothing here starts a thread, but torch's kernels may use its pool of them.

/// The library.
namespace stableedit {}

#include "stableedit/contribution.hpp"
#include "stableedit/low_rank.hpp"
#include "stableedit/master_weight.hpp"
#include "stableedit/module_editor.hpp"
#include "stableedit/moments.hpp"
#include "stableedit/niw.hpp"
#include "stableedit/normalizer.hpp"
#include "stableedit/null_space.hpp"
#include "stableedit/past_keys.hpp"
#include "stableedit/patch.hpp"
#include "stableedit/ridge.hpp"
#include "stableedit/safetensors.hpp"
#include "stableedit/serialization.hpp"
#include "stableedit/step.hpp"
#include "stableedit/whitening.hpp"
