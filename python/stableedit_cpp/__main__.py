"""``python -m stableedit_cpp`` is the ``stableedit`` command."""

import sys

from stableedit_cpp.cli import main

sys.exit(main())
