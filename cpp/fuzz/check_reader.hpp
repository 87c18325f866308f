#pragma once

// What must hold for every sequence of bytes that is given to the readers of safetensors files,
// however broken or malicious. Shared by the fuzzer and the test of mutations.

#include <ATen/ops/ones.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>

#include "stableedit/normalizer.hpp"
#include "stableedit/null_space.hpp"
#include "stableedit/past_keys.hpp"
#include "stableedit/serialization.hpp"

namespace reader {

using stableedit::SafeTensors;

constexpr const char* kSource = "input.safetensors";

/// What keeps a message from being one line of modest length about `subject`; empty if nothing.
inline std::string not_a_sentence(const std::string& message, const std::string& subject) {
  if (message.size() <= subject.size() || !message.starts_with(subject)) {
    return "does not say what is wrong with '" + subject + "'";
  }
  if (message.size() > 1000) return "takes " + std::to_string(message.size()) + " bytes";
  const auto control = [](unsigned char c) { return c < 0x20 || c == 0x7f; };
  if (std::ranges::any_of(message, control)) return "contains control characters";
  return "";
}

/// Calls `body`, which may refuse with a ValueError about `subject` and in no other way.
/// \return what is wrong, `body` having the first word; empty if nothing is.
inline std::string check(const std::string& subject, const std::function<std::string()>& body) {
  try {
    return body();
  } catch (const c10::ValueError& refusal) {
    const std::string message = refusal.what_without_backtrace();
    const std::string fault = not_a_sentence(message, subject);
    return fault.empty() ? "" : "the refusal " + fault + ": " + message.substr(0, 1000);
  } catch (const std::exception& error) {
    return std::string("not a ValueError: ") + error.what();
  }
}

inline bool same_content(const SafeTensors& a, const SafeTensors& b) {
  const auto same_tensor = [](const auto& x, const auto& y) {
    const at::Tensor& s = x.second;
    const at::Tensor& t = y.second;
    return x.first == y.first && s.scalar_type() == t.scalar_type() && s.sizes() == t.sizes() &&
           (s.nbytes() == 0 ||
            std::memcmp(s.const_data_ptr(), t.const_data_ptr(), s.nbytes()) == 0);
  };
  return a.metadata == b.metadata && a.tensors.size() == b.tensors.size() &&
         std::equal(a.tensors.begin(), a.tensors.end(), b.tensors.begin(), same_tensor);
}

/// A state that is accepted must be one that can be used.
inline void use_past_keys(const stableedit::StateDict& state) {
  auto past = stableedit::PastKeys::from_state_dict(state);
  if (past.dim() > 64) return;  // only slow
  try {
    past.solve(at::ones({2, past.dim()}), 0.5, 1.0);
    past.update(at::ones({2, past.dim()}));
    past.solve(at::ones({2, past.dim()}), 0.5, 1.0);
  } catch (const c10::LinAlgError&) {
    // The moment need not be that of any keys, and then has no root.
  }
}

/// The same for a null space.
inline void use_null_space(const stableedit::StateDict& state) {
  const auto space = stableedit::NullSpace::from_state_dict(state);
  if (space.dim() <= 64) space.project(at::ones({2, space.dim()}));
}

/// The same for the statistics.
inline void use_normalizer(const stableedit::StateDict& state) {
  auto normalizer = stableedit::LifelongNormalizer::from_state_dict(state);
  const int64_t k = normalizer.key_dim();
  const int64_t v = normalizer.value_dim();
  if (k > 64 || v > 64) return;  // only slow
  try {
    normalizer.observe(at::ones({2, k}), at::ones({2, v}));
    normalizer.merge(normalizer);
    normalizer.normalize_keys(at::ones({2, k}));
    normalizer.normalize_value_gradients(at::ones({2, v}));
  } catch (const c10::LinAlgError&) {
    // A scatter need not be that of any data, and then has no root.
  }
}

/// \return what is wrong with how the readers treat `bytes`; empty if nothing is.
inline std::string check_reader(std::string_view bytes) {
  const auto check_patch = [](std::string_view patch) {
    return check(kSource, [&] {
      stableedit::parse_patch(patch, kSource);
      return "";
    });
  };
  std::string wrong = check_patch(bytes);
  if (!wrong.empty()) return "patch: " + wrong;

  SafeTensors content;
  bool accepted = false;
  wrong = check(kSource, [&] {
    content = stableedit::parse_safetensors(bytes, kSource);
    accepted = true;
    return "";
  });
  if (!wrong.empty() || !accepted) return wrong;

  // Written and read again it is the same. What was written has a valid checksum, so now the reader
  // of patches comes to look at what is behind that.
  const std::string written = stableedit::serialize_safetensors(content);
  if (!same_content(content, stableedit::parse_safetensors(written))) return "another content";
  wrong = check_patch(written);
  if (!wrong.empty()) return "patch: " + wrong;

  wrong = check("", [&] {
    if (content.tensors.contains("pieces")) {
      use_past_keys(content.tensors);
    } else if (content.tensors.contains("basis")) {
      use_null_space(content.tensors);
    } else {
      use_normalizer(content.tensors);
    }
    return "";
  });
  return wrong.empty() ? "" : "state: " + wrong;
}

}  // namespace reader
