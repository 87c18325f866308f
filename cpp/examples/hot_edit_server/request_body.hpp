#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

namespace hot_edit {

/// The JSON object that a request carries. Every method throws Refusal with what is wrong.
class RequestBody {
 public:
  /// \param members the names that may occur
  RequestBody(const std::string& text, std::initializer_list<const char*> members);

  std::string text(const char* name) const;
  std::optional<std::string> optional_text(const char* name) const;
  int64_t whole(const char* name, int64_t otherwise, int64_t smallest, int64_t largest) const;

 private:
  nlohmann::json json_;
};

}  // namespace hot_edit
