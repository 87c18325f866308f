"""Experiments on streams of edits: the benchmark, ablations, and what the theory predicts."""

from stableedit_cpp.editors import EDITORS, NamedEditor, named_editor
from stableedit_cpp.experiments.after_stream import Step
from stableedit_cpp.experiments.matrix import Matrix, read_yaml
from stableedit_cpp.experiments.results import Results, Run, read_results, read_run
from stableedit_cpp.experiments.run_directory import RunDirectory
from stableedit_cpp.experiments.run_matrix import run_matrix
from stableedit_cpp.experiments.search_settings import SearchSettings
from stableedit_cpp.experiments.settings import RunSettings, WarmUp
from stableedit_cpp.experiments.sources import DATASETS, Source, find_source
from stableedit_cpp.experiments.stream_run import StreamRun
from stableedit_cpp.experiments.theory import theory_of, theory_table

__all__ = [
    "DATASETS",
    "EDITORS",
    "Matrix",
    "NamedEditor",
    "Results",
    "Run",
    "RunDirectory",
    "RunSettings",
    "SearchSettings",
    "Source",
    "Step",
    "StreamRun",
    "WarmUp",
    "find_source",
    "named_editor",
    "read_results",
    "read_run",
    "read_yaml",
    "run_matrix",
    "theory_of",
    "theory_table",
]
