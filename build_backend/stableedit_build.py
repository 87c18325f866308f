"""PEP 517 backend: scikit-build-core, compiling against the torch of the environment that is installed into.

A package that uses torch's C++ API works only with the minor version of torch that it was compiled with. Listing
torch in `build-system.requires` would compile against whatever a fresh resolve picks (and download gigabytes of CUDA
packages to do so), hence this wrapper: it looks for the torch that is already installed, hands its directory to CMake,
and asks for torch as a build requirement only when there is none. Set STABLEEDIT_TORCH_ROOT to name one yourself.

The headers of nlohmann/json are in a source distribution (`make vendor` puts them there); they are asked for only where
they are missing.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  the hooks that need no change

_JSON = Path(__file__).parents[1] / "third_party/nlohmann_json/include/nlohmann/json.hpp"

# Prints torch's directory, without importing torch. Extension modules fit one minor version of Python only.
_FIND_TORCH = f"""
import importlib.util, sys
spec = importlib.util.find_spec("torch") if sys.version_info[:2] == {sys.version_info[:2]} else None
print(spec.submodule_search_locations[0] if spec and spec.origin else "")
"""


def get_requires_for_build_wheel(config_settings=None):
    return _backend.get_requires_for_build_wheel(config_settings) + _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _backend.get_requires_for_build_editable(config_settings) + _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _export_torch_root()
    return _backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _export_torch_root()
    return _backend.build_editable(wheel_directory, config_settings, metadata_directory)


def _requirements() -> list[str]:
    """What is neither installed nor part of this source tree."""
    headers = [] if _JSON.is_file() else ["nlohmann-json>=3.11"]
    return headers if _torch_root() else [*headers, "torch"]


def _export_torch_root() -> None:
    """Tells cmake/FindTorch.cmake which torch to use."""
    if root := _torch_root():
        os.environ["STABLEEDIT_TORCH_ROOT"] = root
        print(f"stableedit: compiling against the torch in {root}", flush=True)


def _torch_root() -> str | None:
    """Directory of the torch to compile against: named, visible to this interpreter, or in the target environment."""
    if root := os.environ.get("STABLEEDIT_TORCH_ROOT"):
        return root
    # pip isolates a build by setting PYTHONPATH for the user's own interpreter: -E undoes that. Without -E comes what
    # is in the build environment itself.
    commands = [[sys.executable, "-E"], [sys.executable]]
    if target := _uv_target():
        commands.append([target, "-E"])
    for command in commands:
        found = subprocess.run([*command, "-c", _FIND_TORCH], capture_output=True, text=True, check=False)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip()
    return None


def _uv_target() -> str | None:
    """Interpreter of the environment that uv is installing into; None where uv is not at work.

    uv builds in a virtual environment of its own and does not say which environment the result is for, so this repeats
    uv's documented search (--python, UV_PYTHON, VIRTUAL_ENV, CONDA_PREFIX, .venv here or above, PATH) with the command
    line and environment of the uv process, which is our parent. uv's `match-runtime` build dependencies are no way out:
    uv would then download that torch again, and fail where its index lacks it (a local version such as +cpu).
    """
    if "UV" not in os.environ:
        return None
    parent = Path("/proc", str(os.getppid()))
    try:
        arguments = (parent / "cmdline").read_text().split("\0")
        entries = (parent / "environ").read_text(errors="surrogateescape").split("\0")
    except OSError:  # no /proc on this system
        arguments, entries = [], []
    environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)

    named = [after for flag, after in itertools.pairwise(arguments) if flag in ("--python", "-p")]
    named += [argument.removeprefix("--python=") for argument in arguments if argument.startswith("--python=")]
    named += [environment.get(name, "") for name in ("UV_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")]
    named += [str(directory / ".venv") for directory in (Path.cwd(), *Path.cwd().parents)]
    named.append(shutil.which("python3", path=environment.get("PATH")) or "")

    pythons = [Path(name, "bin", "python") if Path(name).is_dir() else Path(name) for name in named if name]
    return next((str(python) for python in pythons if python.is_file()), None)
