"""Puts charts and tables on one page that needs nothing but itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from stableedit_cpp import _build_info
from stableedit_cpp.experiments.groups import Group, grouped
from stableedit_cpp.experiments.results import Results, read_results
from stableedit_cpp.experiments.run_tables import comparison, cost, over_seeds
from stableedit_cpp.experiments.theory import cumulative_tables, theory_table
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.table import Table
from stableedit_cpp.report.effect_charts import hidden_state_maps, memory, perplexity_curves, time_by_part
from stableedit_cpp.report.effect_tables import downstream, hidden_states, provenance
from stableedit_cpp.report.geometry_charts import theory_charts, update_geometry
from stableedit_cpp.report.pictures import PALETTE, Picture
from stableedit_cpp.report.stream_charts import along_the_stream, final_bars, retention

__all__ = ["write_report"]

_PAGE, _CHARTS = "index.html", "charts"


@dataclass
class Figure:
    """Pictures side by side with one caption."""

    caption: str
    pictures: list[Picture]


@dataclass
class Section:
    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


def _check_packages() -> None:
    """
    Raises:
        ValueError: if a package that draws the report is not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"a report needs {' and '.join(missing)}: pip install 'stableedit-cpp[report]'")


def write_report(
    paths: Iterable[str | Path], output: str | Path, *, title: str = "Benchmark report", overwrite: bool = False
) -> Path:
    """Write ``output/index.html`` and ``output/charts/*.png``.

    Args:
        paths: directories with results, also above them.
        output: new directory. overwrite: replace one that has content.

    Returns:
        path of the page.

    Raises:
        ValueError: for results that cannot be read (see ``read_results``), a missing package, or an output directory
            with content.
    """
    _check_packages()
    import jinja2

    results = read_results(paths)
    groups = grouped(results.runs)
    sections = [section for section in _sections(results, groups) if section.tables or section.figures]
    source = resources.files("stableedit_cpp.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(source).render(
        title=title,
        sections=sections,
        palette=PALETTE,
        charts=_CHARTS,
        runs=results.runs,
        groups=groups,
        version=_build_info.version,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    output = Path(output)
    with new_directory(output, overwrite=overwrite) as scratch:
        (scratch / _CHARTS).mkdir()
        for section in sections:
            for picture in (picture for figure in section.figures for picture in figure.pictures):
                (scratch / _CHARTS / f"{picture.name}.png").write_bytes(picture.png)
        (scratch / _PAGE).write_text(page, encoding="utf-8")
    return output / _PAGE


def _sections(results: Results, groups: list[Group]) -> list[Section]:
    many = [group for group in groups if len(group.runs) > 1]
    maps = [(run, hidden_state_maps(run, index)) for group in groups for index, run in enumerate(group.runs)]
    labels = {run.document["name"]: f"{run.label}, {run.settings['dataset']}" for run in results.runs}
    theories = [run for _, theory in results.theories for run in theory["runs"]]
    charts = [(path, theory_charts(path, theory, labels)) for path, theory in results.theories]
    return [
        Section("comparison", "Comparison", _present([comparison(groups), over_seeds(groups)])),
        Section(
            "stream",
            "Along the stream",
            figures=_figures(
                (f"{g.title}. Requests edited so far, on the model of that moment; bands: one standard error.", f)
                for g, f in ((group, along_the_stream(group)) for group in groups if _has_stream(group))
            ),
        ),
        Section(
            "retention",
            "Retention by age of an edit",
            figures=_figures(
                (f"{g.title}. On the final model; bars: one standard error.", retention(g)) for g in groups
            ),
        ),
        Section(
            "editors",
            "Editors and ablations",
            figures=_figures((f"{g.title}. End of the stream; bars: one standard error.", final_bars(g)) for g in many),
        ),
        Section(
            "geometry",
            "Geometry of the updates",
            tables=_present([theory_table(theories, labels), *cumulative_tables(theories)]),
            figures=_figures(
                [
                    (
                        f"{group.title}. One update a turn; drift: of editors that keep statistics.",
                        update_geometry(group),
                    )
                    for group in groups
                ]
                + [(f"From {path.name}/theory.json.", pictures) for path, pictures in charts]
            ),
        ),
        Section(
            "hidden-states",
            "Hidden states of unrelated prompts",
            tables=_present([hidden_states(results.runs)]),
            figures=_figures(
                (f"{run.settings['dataset']}, {run.label}. Circles: before, crosses: after.", f) for run, f in maps
            ),
        ),
        Section(
            "downstream",
            "Downstream tasks and perplexity",
            tables=_present(downstream(group) for group in groups),
            figures=_figures((f"{group.title}. Lower is better.", perplexity_curves(group)) for group in groups),
        ),
        Section(
            "cost",
            "Cost",
            tables=_present([cost(results.runs)]),
            figures=_figures((group.title + ".", time_by_part(group) + memory(group)) for group in groups),
        ),
        Section("provenance", "Provenance", _present([provenance(results.runs)])),
    ]


def _has_stream(group: Group) -> bool:
    return any(len(run.stream) > 1 for run in group.runs)


def _present(found: Iterable[Table]) -> list[Table]:
    return [table for table in found if table.rows]


def _figures(found: Iterable[tuple[str, list[Picture]]]) -> list[Figure]:
    return [Figure(caption, pictures) for caption, pictures in found if pictures]
