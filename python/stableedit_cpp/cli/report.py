"""``stableedit report``: results as a page for people."""

from __future__ import annotations

import argparse
from pathlib import Path

from stableedit_cpp.cli.options import show
from stableedit_cpp.files.atomic import check_new_directory
from stableedit_cpp.report import write_report


def run(options: argparse.Namespace) -> int:
    check_new_directory(options.output, overwrite=options.overwrite)
    page = write_report(options.results, options.output, title=options.title, overwrite=options.overwrite)
    charts = sorted(str(path) for path in Path(options.output).glob("charts/*.png"))
    show(options, {"results": options.results, "page": page, "charts": charts}, page)
    return 0
