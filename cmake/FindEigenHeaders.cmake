# Finds Eigen (headers only, see third_party/eigen/README.md) and defines Eigen3::Eigen.
#
# First in third_party, where `make vendor` and a source distribution have the headers. Then, besides the
# usual places, where the PyPI package `cmeel-eigen` puts them: under cmeel.prefix in a site-packages
# directory, which is each entry of CMAKE_PREFIX_PATH in an isolated pip build and torch's parent
# directory otherwise. -DEigen3_DIR=<directory with Eigen3Config.cmake> names another.
get_filename_component(_eigen_vendored "${CMAKE_CURRENT_LIST_DIR}/../third_party/eigen/include" ABSOLUTE)
if(NOT Eigen3_DIR AND EXISTS "${_eigen_vendored}/Eigen/Core")
  set(_eigen_found "${_eigen_vendored}")
  if(NOT TARGET Eigen3::Eigen)
    add_library(Eigen3::Eigen INTERFACE IMPORTED)
    set_target_properties(Eigen3::Eigen PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${_eigen_vendored}")
  endif()
else()
  set(_eigen_hints "${TORCH_ROOT}/../cmeel.prefix")
  foreach(_eigen_dir IN LISTS CMAKE_PREFIX_PATH)
    list(APPEND _eigen_hints "${_eigen_dir}/cmeel.prefix")
  endforeach()
  find_package(Eigen3 CONFIG QUIET HINTS ${_eigen_hints})
  set(_eigen_found "${Eigen3_DIR}")
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(EigenHeaders
  REQUIRED_VARS _eigen_found
  REASON_FAILURE_MESSAGE
    "Run `make vendor`, or install Eigen with `pip install cmeel-eigen` in the environment of torch, or from your system (Debian: libeigen3-dev).")
