"""``stableedit report``: results as a page for people."""

from __future__ import annotations

import argparse

from stableedit_cpp.files.atomic import check_new_directory
from stableedit_cpp.report import write_report


def run(options: argparse.Namespace) -> int:
    check_new_directory(options.output, overwrite=options.overwrite)
    print(write_report(options.results, options.output, title=options.title, overwrite=options.overwrite))
    return 0
