"""One page for people out of the results of ``stableedit bench``."""

from stableedit_cpp.experiments.results import Results, Run, read_results
from stableedit_cpp.report.page import write_report

__all__ = ["Results", "Run", "read_results", "write_report"]
