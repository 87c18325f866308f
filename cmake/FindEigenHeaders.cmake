# Finds Eigen (headers only, see third_party/eigen/README.md) and defines Eigen3::Eigen.
#
# Besides the usual places it looks where the PyPI package `cmeel-eigen` puts the headers: under
# cmeel.prefix in a site-packages directory, which is each entry of CMAKE_PREFIX_PATH in an isolated
# pip build and torch's parent directory otherwise.
set(_eigen_hints "${TORCH_ROOT}/../cmeel.prefix")
foreach(_eigen_dir IN LISTS CMAKE_PREFIX_PATH)
  list(APPEND _eigen_hints "${_eigen_dir}/cmeel.prefix")
endforeach()
find_package(Eigen3 CONFIG QUIET HINTS ${_eigen_hints})

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(EigenHeaders
  REQUIRED_VARS Eigen3_DIR
  VERSION_VAR Eigen3_VERSION
  REASON_FAILURE_MESSAGE
    "Install Eigen with `pip install cmeel-eigen` in the environment of torch, or from your system (Debian: libeigen3-dev).")
