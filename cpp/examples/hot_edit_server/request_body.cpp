#include "request_body.hpp"

#include <algorithm>

#include "refusal.hpp"

namespace hot_edit {

RequestBody::RequestBody(const std::string& text, std::initializer_list<const char*> members) {
  std::string known;
  for (const char* member : members)
    known += (known.empty() ? "\"" : ", \"") + std::string(member) + "\"";
  try {
    json_ = nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    throw Refusal(400, "the body is not valid JSON from byte " + std::to_string(error.byte) +
                           " on; it must be an object with " + known);
  } catch (const nlohmann::json::out_of_range&) {
    throw Refusal(400,
                  "the body has a number that is too large; it must be an object with " + known);
  }
  if (!json_.is_object())
    throw Refusal(400, std::string("the body must be a JSON object with ") + known +
                           ", but it is " + json_.type_name());
  for (const auto& [name, value] : json_.items()) {
    if (std::ranges::none_of(members, [&](const char* m) { return name == m; }))
      throw Refusal(400, "the body has a member " +
                             nlohmann::json(name.substr(0, 40))
                                 .dump(-1, ' ', true, nlohmann::json::error_handler_t::replace) +
                             ", but only " + known + " may occur");
  }
}

std::string RequestBody::text(const char* name) const {
  const auto value = optional_text(name);
  if (!value) throw Refusal(400, std::string("the body lacks \"") + name + "\", a text");
  return *value;
}

std::optional<std::string> RequestBody::optional_text(const char* name) const {
  const auto value = json_.find(name);
  if (value == json_.end()) return std::nullopt;
  if (!value->is_string())
    throw Refusal(400,
                  std::string("\"") + name + "\" must be a text, but it is " + value->type_name());
  return value->get<std::string>();
}

int64_t RequestBody::whole(const char* name, int64_t otherwise, int64_t smallest,
                           int64_t largest) const {
  const auto value = json_.find(name);
  if (value == json_.end()) return otherwise;
  const bool fits = value->is_number_integer() &&
                    (!value->is_number_unsigned() || value->get<uint64_t>() <= uint64_t(largest)) &&
                    value->get<int64_t>() >= smallest && value->get<int64_t>() <= largest;
  if (!fits)
    throw Refusal(400, std::string("\"") + name + "\" must be a whole number from " +
                           std::to_string(smallest) + " to " + std::to_string(largest));
  return value->get<int64_t>();
}

}  // namespace hot_edit
