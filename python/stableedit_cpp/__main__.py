"""``python -m stableedit_cpp`` is the ``stableedit`` command."""

import sys

from stableedit_cpp.cli import main

if __name__ == "__main__":
    sys.exit(main())
