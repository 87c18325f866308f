"""Runs a matrix of experiments below one directory, each model loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from stableedit_cpp.experiments.results import RunDirectory, command_line, read_run
from stableedit_cpp.experiments.runner import StreamRun
from stableedit_cpp.experiments.settings import RunSettings
from stableedit_cpp.experiments.tables import comparison_table, run_table
from stableedit_cpp.lifelong.lock import SessionLocked, WriterLock, writer
from stableedit_cpp.modules import default_edit_modules, find_modules
from stableedit_cpp.output import write_text
from stableedit_cpp.trunk_cache import TrunkCache

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
        trunk_bytes: limit of the trunk cache, which runs on one model share; 0 keeps none.
        how: ``snapshot_seconds``, ``keep_state`` and ``progress``, as for ``StreamRun``.

    Returns:
        The content of each ``run.json``.

    Raises:
        ValueError: if a directory holds a run of another configuration, before anything is run; or another process
            works on it. KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    output = Path(output)
    directories = [RunDirectory(output / run.name, run.name, run.to_dict(), command_line()) for run in runs]
    for model_name in dict.fromkeys(run.model for run in runs):
        todo = [(r, d) for r, d in zip(runs, directories, strict=True) if r.model == model_name and not d.done]
        if not todo:
            continue
        model, tokenizer = load(model_name)
        trunks: dict[tuple[str, ...], TrunkCache | None] = {}
        for run, directory in todo:
            modules = find_modules(model, run.editor.config.edit_modules or default_edit_modules(model))
            key = tuple(module.name for module in modules)
            if key not in trunks:
                trunks[key] = TrunkCache.where_possible(model, modules, max_bytes=trunk_bytes) if trunk_bytes else None
            with _locked(directory.path):
                current = RunDirectory(directory.path, run.name, directory.settings, command_line())
                stream = StreamRun(run, current, model, tokenizer, trunk=trunks[key], **how)
                try:
                    stream.run()
                finally:
                    if current.document["checkpoints"]:
                        write_text(current.path / "table.md", run_table(current.document))
        del model
    documents = [read_run(directory.path) for directory in directories]
    write_text(output / "table.md", comparison_table(documents))
    return documents


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process works on a run."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = WriterLock(directory)
    except SessionLocked:
        raise ValueError(
            f"{directory} is worked on {writer(directory) or 'elsewhere'}; wait for it, or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()
