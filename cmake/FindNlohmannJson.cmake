# Finds nlohmann/json (headers only, private to the library) and defines nlohmann_json::nlohmann_json.
#
# First in third_party, where `make vendor` and a source distribution have the headers. Then, besides the
# usual places, where the PyPI package `nlohmann-json` puts them: in a site-packages directory, which is
# each entry of CMAKE_PREFIX_PATH in an isolated pip build and torch's parent directory otherwise.
set(_json_hints
  "${CMAKE_CURRENT_LIST_DIR}/../third_party/nlohmann_json/include" "${TORCH_ROOT}/../nlohmann_json/include")
foreach(_json_dir IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND _json_hints "${_json_dir}/nlohmann_json/include")
endforeach()
find_path(NLOHMANN_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS ${_json_hints})

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NlohmannJson
  REQUIRED_VARS NLOHMANN_JSON_INCLUDE_DIR
  REASON_FAILURE_MESSAGE
    "Run `make vendor`, or install it with `pip install nlohmann-json` in the environment of torch, or from your system (Debian: nlohmann-json3-dev).")
mark_as_advanced(NLOHMANN_JSON_INCLUDE_DIR)

if(NlohmannJson_FOUND AND NOT TARGET nlohmann_json::nlohmann_json)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED)
  set_target_properties(nlohmann_json::nlohmann_json PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${NLOHMANN_JSON_INCLUDE_DIR}")
endif()
