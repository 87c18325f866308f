"""The report: what is read, what is on the page, and the page in a real browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

from stableedit_cpp.cli import main
from stableedit_cpp.experiments.groups import grouped
from stableedit_cpp.experiments.run_tables import run_page
from stableedit_cpp.report import read_results, write_report
from stableedit_cpp.report.pictures import PALETTE, style, thinned
from support.results import score, write_run, write_theory

pytest.importorskip("matplotlib", reason="a report needs the extra 'report'")

EDITORS = {"stableedit": 0.55, "ultraedit-published": 0.45, "no-ln": 0.2}


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report of three editors and two data sets, with theory, a second seed and an unfinished run."""
    directory = tmp_path_factory.mktemp("results")
    for editor, level in EDITORS.items():
        write_run(directory, editor, level=level)
    write_run(directory, "stableedit", seed=1, level=0.53)
    write_run(directory, "stableedit", dataset="stream", status="running", turns=700)
    write_theory(directory, "no-ln-zsre-smollm2-135m-seed0")
    collapsed = write_run(directory, "no-ln", dataset="stream", level=0.1) / "run.json"
    change(collapsed, collapsed={"edits": 1000, "turn": 11, "reason": "the gradients are not finite"})
    return write_report([directory], tmp_path_factory.mktemp("report") / "report", title="A <title>")


# --- reading ---


def test_runs_are_found_grouped_and_labelled(tmp_path):
    write_run(tmp_path / "a", "stableedit")
    write_run(tmp_path / "a", "stableedit", seed=1)
    write_run(tmp_path / "b" / "c", "no-ln")
    write_run(tmp_path / "b", "no-ln", dataset="fever")
    write_run(tmp_path / "b" / ".being-written", "diagonal")
    found = grouped(read_results([tmp_path, tmp_path / "a"]).runs)  # a run that is found twice counts once
    assert [group.title for group in found] == ["fever, smollm2-135m", "zsre, smollm2-135m"]
    assert [run.label for run in found[1].runs] == ["no-ln", "stableedit, seed 0", "stableedit, seed 1"]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: run.unlink(), "holds no results: there is no run.json and no theory.json in it or below it"),
        (lambda run: run.write_text('{"form'), "run.json is not valid JSON"),
        (lambda run: run.write_text("[]"), "is not of the format 'stableedit-bench-run'"),
        (lambda run: change(run, version=2), "has version 2; this stableedit reads version 1"),
        (lambda run: change(run, settings={"editor": "x"}), "lacks settings.dataset"),
        (lambda run: change(run, checkpoints=[]), "the run has no checkpoint yet"),
        (lambda run: change(run, checkpoints=[{"edits": 0}]), "checkpoint 0 lacks scores"),
        (lambda run: (run.parent / "turns.jsonl").write_text("{}\n{"), "turns.jsonl, line 2: not valid JSON"),
    ],
)
def test_bad_results_get_a_sentence(tmp_path, capsys, spoil, sentence):
    spoil(write_run(tmp_path / "results") / "run.json")
    assert main(["report", str(tmp_path / "results"), "--output", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_a_turn_that_is_being_written_is_left_out(tmp_path):
    path = write_run(tmp_path, status="running")
    with open(path / "turns.jsonl", "a") as file:
        file.write('{"edits": 5')
    assert len(read_results([tmp_path]).runs[0].turns) == 12


def test_an_output_directory_with_content_is_kept(tmp_path, capsys):
    write_run(tmp_path / "results")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "mine.txt").write_text("mine")
    arguments = ["report", str(tmp_path / "results"), "--output", str(tmp_path / "report")]
    assert main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere"), "--output", str(tmp_path / "new")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err


def test_many_turns_are_averaged():
    points = [(turn, float(turn % 2)) for turn in range(1, 2001)]
    found = thinned(points)
    assert len(found) <= 100
    assert found[-1][0] == 2000
    assert all(0 < y < 1 for _, y in found)
    assert thinned(points[:90]) == points[:90]
    assert thinned([]) == []


# --- the page as a document ---


class Document(HTMLParser):
    """Which elements there are, whether they are closed, and what they refer to."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attributes.get(attribute)]


def test_the_page_is_whole_and_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    document = Document(text)
    assert document.open == []
    identifiers = document.all("id")
    assert len(identifiers) == len(set(identifiers))
    references = [*document.all("href"), *document.all("xlink:href"), *document.all("src")]
    references += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)]
    assert references
    for reference in references:
        assert reference == "data:," or reference.removeprefix("#") in identifiers, reference
    assert "@import" not in text
    assert "A &lt;title&gt;" in text


def test_every_chart_is_described_and_saved(page):
    document = Document(page.read_text(encoding="utf-8"))
    charts = {a["data-chart"]: a for _, a in document.elements if a.get("data-chart")}
    assert {path.stem for path in (page.parent / "charts").iterdir()} == set(charts)
    for name, attributes in charts.items():
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 60, name
        assert (page.parent / "charts" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    kinds = ("curve-", "retention-", "final-", "geometry-", "map-", "perplexity-", "memory-", "time-", "convergence-")
    for kind in (*kinds, "cumulative-"):
        assert any(name.startswith(kind) for name in charts), kind


def test_figures_on_the_page_are_those_of_the_results(page):
    text = page.read_text(encoding="utf-8")
    assert "★ 0.4" in text  # best efficacy at the end: about 0.8 of the level
    assert "500 of 1,000, unfinished" in text
    assert "1,000 of 1,000, broke down" in text
    assert "0.500 ± 0.010 (576x1536)" in text
    assert "Mean over seeds" in text
    assert "0.540 ± 0.020 (-0.010)" in text  # downstream accuracy and its change
    assert "not finite" not in text


def table(page: Path, name: str) -> list[list[str]]:
    """Of a table on the page, cell by cell, its head first."""
    text = page.read_text(encoding="utf-8").split(f'<table data-name="{name}">')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in text.split("</tr>")]
    return [[re.sub(r"<[^>]+>|\s+", " ", cell).strip() for cell in row] for row in rows if row]


def test_editors_that_were_searched_for_and_pruned(tmp_path):
    for number in range(3):
        path = write_run(tmp_path / "results", f"e{number}", level=0.3) / "run.json"
        (path.parent / "turns.jsonl").unlink()
        document = json.loads(path.read_text())
        before, *_, last = document["checkpoints"]
        for checkpoint in (before, last):
            checkpoint["scores"] = {"efficacy": score(0.25 if number < 2 else 0.2), "specificity": score(0.1)}
            checkpoint["ages"] = []
            for figures in checkpoint["side_effects"]["hidden_states"]["layers"].values():
                figures["maps"] = {}
        document["checkpoints"] = [before, last, last | {"step": 1, "after": "prune"}]
        document["settings"] |= {"sample": None, "config": {"editor": "rledit", "turn_size": 100, "step_size": 1e-6}}
        document["settings"]["search"] = {"values": {}, "edits": 10, "score": "s", "found": {"hypernetwork": "a/b.st"}}
        document["cost"]["turn_extra_bytes"] = 3 * 2**20
        path.write_text(json.dumps(document))
    page = write_report([tmp_path / "results"], tmp_path / "report")
    head, _, *rows = table(page, "comparison")
    column = {name.split(" ↕")[0]: number for number, name in enumerate(head)}
    assert [row[column["efficacy"]].startswith("★") for row in rows] == [True, True, False]
    assert not any("★" in row[column["specificity"]] for row in rows)
    for row in rows:
        assert (row[column["found by the search"]], row[column["edits"]]) == ("hypernetwork b", "1,000, prune")
    assert "hypernetwork b (found by the search)" in run_page(grouped(read_results([tmp_path]).runs)[0].runs[0])
    assert all(row[2] == "1,000, prune" for row in table(page, "hidden-states")[1:])
    assert all(row[1] == "1,000, prune" for row in table(page, "downstream-zsre, smollm2-135m")[2:])
    assert {row[-3] for row in table(page, "cost")[1:]} == {"3"}


def test_many_lines_can_be_told_from_each_other():
    styles = [style(number) for number in range(20)]
    assert len({(look.color, look.linestyle) for look in styles}) == len(styles)
    assert len({(look.color, look.marker) for look in styles}) == len(styles)


def test_a_model_that_has_collapsed_is_reported(tmp_path):
    path = write_run(tmp_path / "results") / "run.json"
    text = re.sub(
        r'"(perplexity|cka|relative_shift|mmd2|p_value|p_value_paired)": [\d.]+', r'"\1": null', path.read_text()
    )
    path.write_text(re.sub(r'"maps": \{.*?\]\}\}', '"maps": {}', text))
    assert "not finite" in write_report([tmp_path / "results"], tmp_path / "report").read_text(encoding="utf-8")


def test_a_run_with_little_in_it(tmp_path):
    path = write_run(tmp_path / "results") / "run.json"
    (path.parent / "turns.jsonl").unlink()
    document = json.loads(path.read_text())
    checkpoints = [{"edits": 0, "scores": document["checkpoints"][0]["scores"]}]
    change(path, checkpoints=checkpoints, cost={}, provenance={}, status="running")
    text = write_report([tmp_path / "results"], tmp_path / "report").read_text(encoding="utf-8")
    assert "0 of 1,000, unfinished" in text


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    """WCAG 2.2: 4.5 for text, 3 for graphics."""
    for background, name in product(("--page", "--panel"), PALETTE):
        least = 4.5 if name in ("--ink", "--muted", "--link") else 3 if name == "--line" or name[2:3] == "s" else 0
        assert contrast(PALETTE[name][theme], PALETTE[background][theme]) >= least, (name, background)


def test_colors_can_be_told_from_each_other():
    """Each is replaced by its variable, so no two may be written alike."""
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


# --- the page in a browser ---


@pytest.fixture
def opened(browser, page):
    """Opens the page, offline, and makes sure in the end that the browser found nothing to complain of."""
    contexts, complaints = [], []

    def open_page(**settings):
        context = browser.new_context(offline=True, **settings)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("requestfailed", lambda request: complaints.append(request.url))
        tab.goto(page.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def test_browser_shows_all_charts(opened):
    tab = opened()
    sizes = tab.eval_on_selector_all(
        "[data-chart] svg", "all => all.map(svg => [svg.getBoundingClientRect(), svg.getBBox()].map(b => b.width))"
    )
    assert len(sizes) == tab.locator("[data-chart]").count() > 20
    assert all(width > 200 and drawn > 200 for width, drawn in sizes)


def test_browser_sorts_tables(opened):
    tab = opened()
    table = tab.locator("table[data-name=comparison]")

    def column(index: int) -> list[str]:
        return table.locator(f"tbody tr > :nth-child({index})").evaluate_all("all => all.map(e => e.dataset.value)")

    names = table.locator("thead th").all_inner_texts()
    place = 1 + next(i for i, name in enumerate(names) if name.startswith("efficacy"))
    header = table.locator(f"thead th:nth-child({place})")
    before = column(place)
    header.locator("button").click()
    largest_first = sorted(map(float, before), reverse=True)
    assert [float(value) for value in column(place)] == largest_first
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").press("Enter")  # from the keyboard, too
    assert [float(value) for value in column(place)] == largest_first[::-1]
    assert header.get_attribute("aria-sort") == "ascending"
    table.locator("thead th:nth-child(1) button").click()
    assert column(1) == sorted(column(1))
    assert header.get_attribute("aria-sort") is None
    seeds = table.locator("thead th:nth-child(4)")
    for order in ("descending", "ascending"):
        seeds.locator("button").click()
        assert seeds.get_attribute("aria-sort") == order
        assert column(4)[-1] == ""  # the unedited model has none: last either way


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_browser_follows_the_theme(opened, theme):
    tab = opened(color_scheme=theme)
    shown = tab.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('[data-chart] svg text')).fill]"
    )
    expected = [PALETTE[name][theme == "dark"] for name in ("--page", "--ink")]
    assert shown == [f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})" for color in expected]


def test_browser_on_a_phone_scrolls_tables_and_not_the_page(opened):
    tab = opened(viewport={"width": 360, "height": 740}, device_scale_factor=2)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    small = tab.eval_on_selector_all(
        "[data-chart] svg text", "all => Math.min(...all.map(t => t.getBoundingClientRect().height))"
    )
    assert small >= 8  # CSS pixels
