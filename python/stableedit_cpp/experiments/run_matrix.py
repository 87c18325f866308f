"""Runs a matrix of experiments below one directory, each model loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from stableedit_cpp.editors.registry import modules_of
from stableedit_cpp.errors import SessionBusy
from stableedit_cpp.experiments.groups import grouped
from stableedit_cpp.experiments.results import Run, write_theory
from stableedit_cpp.experiments.run_directory import RunDirectory
from stableedit_cpp.experiments.run_tables import comparison, cost, run_page
from stableedit_cpp.experiments.search import SearchFile, search
from stableedit_cpp.experiments.settings import RunSettings
from stableedit_cpp.experiments.stream_run import StreamRun
from stableedit_cpp.experiments.theory import cumulative_tables, theory_of, theory_table
from stableedit_cpp.files.atomic import write_text
from stableedit_cpp.files.lock import WriterLock, writer
from stableedit_cpp.files.table import Table
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["run_matrix"]

Loader = Callable[[str], tuple[torch.nn.Module, object]]


def run_matrix(
    runs: Sequence[RunSettings],
    output: str | Path,
    load: Loader,
    *,
    trunk_bytes: int = 4 * 2**30,
    **how,
) -> list[dict]:
    """Do all runs, or what is left of them.

    Args:
        load: (model, tokenizer) by name.
        trunk_bytes: limit of the trunk cache for scoring, which runs on one model share, and of another for editing
            where several runs have the same stream; 0 keeps none.
        how: ``snapshot_seconds``, ``keep_state`` and ``progress``, as for ``StreamRun``.

    Returns:
        The content of each ``run.json``. A run with a ``search`` has its trials in ``output/search/NAME.json`` and goes
        on with what was found. ``output/table.md`` compares all; ``theory.json`` and ``theory.md`` sum up
        what those say of the theory that have ``convergence`` or ``cumulative``.

    Raises:
        ValueError: if a directory holds a run of another configuration, before anything is run; or another process
            works on it. KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    output = Path(output)
    runs = [_as_found(run, output) for run in runs]
    paths = [output / run.name for run in runs]
    done = [_done(run, path) for run, path in zip(runs, paths, strict=True)]
    for model_name in dict.fromkeys(run.model for run in runs):
        todo = [index for index, run in enumerate(runs) if run.model == model_name and not done[index]]
        if not todo:
            continue
        model, tokenizer = load(model_name)
        trunks, answers = _Trunks(model, trunk_bytes), {}  # of the unedited model, whatever edits it
        for index in todo:
            run, path = runs[index], paths[index]
            others = [place for place, r in enumerate(runs) if place != index and r.source == run.source]
            modules = modules_of(model, run.editor.config)
            with _locked(path):
                if run.search is not None and run.search.found is None:
                    known = {"trunk": trunks.of(modules, "scoring"), "answers": answers}
                    file = SearchFile(output, run)
                    run = runs[index] = search(file, model, tokenizer, **known, progress=how.get("progress"))
                current = RunDirectory(path, run.name, run.to_dict())
                stream = StreamRun(
                    run,
                    current,
                    model,
                    tokenizer,
                    trunk=trunks.of(modules, "scoring"),
                    editing_trunk=trunks.of(modules, "editing", run.turns) if others else None,
                    answers=answers,
                    siblings=[paths[place] for place in others],
                    **how,
                )
                try:
                    stream.run()
                finally:
                    if current.document["checkpoints"]:
                        write_text(current.path / "table.md", run_page(Run(current.path, current.document)))
        del model
    found = [Run.read(path) for path in paths]
    _write_tables(output / "table.md", [comparison(grouped(found)), cost(found)])
    theories = [theory_of(p) for r, p in zip(runs, paths, strict=True) if r.convergence or r.cumulative]
    if theories:
        write_theory(output, theories)
        _write_tables(output / "theory.md", [theory_table(theories), *cumulative_tables(theories)])
    return [run.document for run in found]


def _as_found(run: RunSettings, output: Path) -> RunSettings:
    """The run with what an earlier call has found for it, if that is known."""
    return run if run.search is None else SearchFile(output, run).settled or run


def _done(run: RunSettings, path: Path) -> bool:
    """Whether the run's directory is; refuses one of another configuration, as far as that is known before a search."""
    if run.search is not None and run.search.found is None:
        return False
    return RunDirectory(path, run.name, run.to_dict()).done


def _write_tables(path: Path, tables: Sequence[Table]) -> None:
    write_text(path, "\n\n".join(table.markdown() for table in tables) + "\n")


class _Trunks:
    """The trunk caches that runs on one model share, the latest for each purpose."""

    def __init__(self, model: torch.nn.Module, max_bytes: int) -> None:
        self._model, self._max_bytes = model, max_bytes
        self._latest: dict[str, tuple[object, TrunkCache | None]] = {}

    def of(self, modules: Sequence[EditModule], purpose: str, of_what: object = None) -> TrunkCache | None:
        """The one for these modules and ``of_what``; None where nothing can be kept."""
        key = ([module.name for module in modules], of_what)
        if self._max_bytes and self._latest.get(purpose, (None,))[0] != key:
            self._latest.pop(purpose, None)  # free it before the next one fills
            trunk = TrunkCache.where_possible(self._model, modules, max_bytes=self._max_bytes)
            self._latest[purpose] = (key, trunk)
        return self._latest.get(purpose, (None, None))[1]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process works on a run."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = WriterLock(directory)
    except SessionBusy:
        raise ValueError(
            f"{directory} is worked on {writer(directory) or 'elsewhere'}; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
