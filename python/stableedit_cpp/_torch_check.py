"""Refuses to import against another torch than the extension was compiled for.

LibTorch keeps no binary compatibility between minor versions; the failure would otherwise be an undefined symbol,
or worse, none.
"""

import sys
from importlib import metadata
from pathlib import Path

from stableedit_cpp import _build_info


def check_torch() -> None:
    """Raise ImportError, with the command that repairs it, unless torch's minor version is that of the build.

    On behalf of the ``stableedit`` command, which is not running yet, say it and exit instead.
    """
    built, running = _build_info.torch_version, _torch_version()
    if built.split(".")[:2] != running.split(".")[:2]:
        message = (
            f"stableedit_cpp {_build_info.version} was built against torch {built}, but torch {running} is installed. "
            "Build it again for this torch:\n"
            "    pip install --force-reinstall --no-deps --no-cache-dir --no-binary stableedit-cpp stableedit-cpp\n"
            "or, from a checkout of the source:\n"
            "    pip install --force-reinstall --no-deps ."
        )
        if Path(sys.argv[0]).name in ("stableedit", "-m"):
            print(f"stableedit: error: {message}", file=sys.stderr)
            sys.exit(2)
        raise ImportError(message)


def _torch_version() -> str:
    """Without loading torch, which takes a second, where its installation says the version."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        import torch

        return torch.__version__
