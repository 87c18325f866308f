#pragma once

#include <stdexcept>
#include <string>

namespace hot_edit {

/// A request that is not carried out, and nothing of it. \param sentence for the one who asked
struct Refusal : std::runtime_error {
  Refusal(int http_status, const std::string& sentence)
      : std::runtime_error(sentence), status(http_status) {}
  int status;
};

}  // namespace hot_edit
