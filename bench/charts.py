"""Draws docs/charts/*.png from bench/results/*.json, as the charts of ``stableedit report``; needs matplotlib.

example:
  python bench/charts.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError:
    raise SystemExit("bench/charts.py needs matplotlib: pip install 'stableedit-cpp[report]'") from None

from stableedit_cpp.report.pictures import GREY, chart_settings, logarithmic, new_figure, png_of, style

_ROOT = Path(__file__).resolve().parent.parent
_OURS, _OTHER, _LIMIT = style(0).color, style(1).color, GREY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=_ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--output", type=Path, default=_ROOT / "docs" / "charts", metavar="DIR")
    options = parser.parse_args()
    found = newest(options.results)
    if not found:
        parser.error(f"there are no results in {options.results}")
    if "take" in found:
        found["take of the default"] = json.loads((options.results / "take.json").read_text(encoding="utf-8"))
        found["take"] |= take_rows(options.results)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (benchmark, draw) in CHARTS.items():
        if benchmark not in found:
            print(f"{name}: no result of {benchmark}, no chart")
            continue
        machine = found[benchmark]["machine"]
        where = f"{machine['device']}, torch {machine['torch']}, {machine['date'][:10]}"
        with chart_settings():
            figure = draw(found[benchmark])
            figure.suptitle(f"bench/{found[benchmark]['benchmark']}.py on {where}", fontsize=9)
            (options.output / f"{name}.png").write_bytes(png_of(figure))
        print(options.output / f"{name}.png")


def newest(directory: Path) -> dict[str, dict]:
    """The latest result of each benchmark; of editing_math, mistral-7b goes before other shapes, and up to
    1,000 edits before more."""
    found: dict[str, dict] = {}
    for path in sorted(directory.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        name = document.get("benchmark")
        if name is None:  # google-benchmark's, which has no chart
            continue
        if name not in found or _rank(document) > _rank(found[name]):
            found[name] = document
    return found


def take_rows(directory: Path) -> dict[str, dict]:
    """The rows of all results of bench/take.py, by file and row, since each file is of one model or one choice of
    modules; and the machine of the latest, with the devices of all."""
    documents = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("take*.json"))
    }
    rows = {f"{stem}: {name}": row for stem, one in documents.items() for name, row in one["rows"].items()}
    machines = [one["machine"] for one in documents.values()]
    devices = ", ".join(dict.fromkeys(machine["device"] for machine in machines))
    return {"rows": rows, "machine": max(machines, key=lambda machine: machine["date"]) | {"device": devices}}


def _rank(document: dict) -> tuple[bool, bool, str]:
    settings = document["settings"]
    return settings.get("shape") == "mistral-7b", settings.get("edits", 0) <= 1000, document["machine"]["date"]


def editing_math(result: dict) -> Figure:
    shape, ours = result["shape"], result["ours"]
    figure, (left, right) = new_figure(2, width=5.5, height=4)
    rows = [("dense products alone", result["dense_products_ms"], _LIMIT)]
    rows += [(f"ours, {mode}", ours[mode]["ms_per_turn"], _OURS) for mode in ("late", "early", "exact")]
    if "published" in result:
        rows.append(("published", result["published"]["ms_per_turn"], _OTHER))
    bars(left, [(label, value / 1000, colour) for label, value, colour in rows], "s", steep=True)
    left.set_xlabel("seconds a turn (logarithmic)")
    left.set_title(f"{result['settings']['shape']}: k {shape['k']}, v {shape['v']}, {shape['modules']} modules")
    bottom = [0.0] * 3
    for index, part in enumerate(ours["late"]["ms_by_part"]):
        values = [ours[mode]["ms_by_part"][part] / 1000 for mode in ("late", "early", "exact")]
        right.bar(["late", "early", "exact"], values, bottom=bottom, label=part, color=style(index).color)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    right.set_ylabel("seconds a turn")
    right.set_title("ours by part")
    right.legend(fontsize=8)
    return figure


def whitening(result: dict) -> Figure:
    spectra = [name for name in ("smollm2", "steep") if name in result]
    figure, axes = new_figure(len(spectra), width=5.5, height=4)
    for axis, spectrum in zip(axes, spectra, strict=True):
        found = result[spectrum]
        rows = []
        for name, method in found["methods"].items():
            if name != "reuse" and "median_ms" in method:
                label = f"{name.replace('_', ' ')}\n(error {method['error']:.0e})"
                rows.append((label, method["median_ms"], _OURS if name == "eigh" else _LIMIT))
        bars(axis, rows, "ms")
        axis.set_xlabel("milliseconds")
        reuse = found["methods"].get("reuse")
        note = f"; reuse: error {reuse['error']:.0e}" if reuse else ""
        axis.set_title(f"{spectrum}: v {found['dim']}, {found['above_floor']} above the floor{note}", fontsize=10)
    return figure


def capture(result: dict) -> Figure:
    figure, (axis,) = new_figure(width=7.5, height=3.2)
    colours = {"limit": _LIMIT, "ours": _OURS, "published": _OTHER}
    bars(axis, [(name, result[name]["median_ms"] / 1000, colour) for name, colour in colours.items()], "s")
    axis.set_xlabel("seconds a turn, median")
    axis.set_title(
        f"Capture of {result['requests']} requests: {result['over_limit']:.2f} of the limit, "
        f"published takes {result['speedup']:.1f} times as long",
        fontsize=10,
    )
    return figure


def stream(result: dict) -> Figure:
    figure, (left, right) = new_figure(2, width=5, height=3.6)
    rows = [("ours", result["edits_per_second_ours"], _OURS)]
    rows.append(("published", result["edits_per_second_published"], _OTHER))
    bars(left, rows, "edits/s")
    left.set_xlabel("edits a second")
    left.set_title(f"{result['edits']} ZsRE edits: {result['speedup']:.1f} times faster")
    pairs = [("ours", result["seconds_by_part_ours"]), ("published", result["seconds_by_part_published"])]
    for index, part in enumerate(("capture", "mathematics", "apply")):
        before = [sum(list(parts.values())[: list(parts).index(part)]) if part in parts else 0 for _, parts in pairs]
        values, colour = [parts.get(part, 0) for _, parts in pairs], style(index).color
        right.bar([name for name, _ in pairs], values, bottom=before, label=part, color=colour)
    right.set_ylabel("seconds in all")
    right.set_title(f"ours: mathematics {100 * result['mathematics_share']:.1f} % of a turn")
    right.legend(fontsize=8)
    return figure


def take(result: dict) -> Figure:
    figure, (axis,) = new_figure(width=9, height=5)
    shown = {
        "efficacy_free": "free answer\nis the target",
        "generalization": "generalization,\nteacher-forced",
        "generalization_free": "paraphrase,\nfree answer",
        "specificity": "specificity",
        "locality_agreement": "agreement with the\nunedited answers",
    }
    width = 0.8 / len(result["rows"])
    for index, (name, row) in enumerate(result["rows"].items()):
        means, errors = row["edited"]["means"], row["edited"]["standard_errors"]
        places = [place + width * (index - (len(result["rows"]) - 1) / 2) for place in range(len(shown))]
        how = {"color": style(index).color, "yerr": [errors[metric] or 0.0 for metric in shown], "label": name}
        axis.bar(places, [means[metric] for metric in shown], width, error_kw={"linewidth": 0.8}, **how)
    axis.set_xticks(range(len(shown)), shown.values())
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return figure


def scaling(result: dict) -> Figure:
    figure, (left, right) = new_figure(2, width=5, height=3.6)
    deciles = range(1, 11)
    left.plot(deciles, result["ms_per_turn_by_decile"], "o-", color=_OURS, label="mean")
    left.plot(deciles, result["median_ms_per_turn_by_decile"], "s--", color=_LIMIT, label="median")
    left.set_ylabel("milliseconds a turn")
    left.set_title(f"{result['turns']} turns, {result['decompositions']} decompositions")
    left.legend(fontsize=8)
    right.plot(deciles, [value / 2**20 for value in result["memory_bytes_by_decile"]], "o-", color=_OURS)
    right.set_ylabel("memory in use, MiB")
    right.set_title("memory")
    for axis in (left, right):
        axis.margins(y=0.1)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_xlabel("decile of the stream")
        axis.set_xticks(list(deciles))
    return figure


def evaluation(result: dict) -> Figure:
    figure, (axis,) = new_figure(width=7.5, height=3.2)
    seconds = result["seconds"]
    middle = sorted(seconds["without"])[len(seconds["without"]) // 2]
    later = sorted(seconds["with_later"])[len(seconds["with_later"]) // 2]
    rows = [("without cache", middle, _LIMIT), ("first with cache", seconds["with_first"], _OURS)]
    bars(axis, [*rows, ("later with cache", later, _OURS)], "s")
    axis.set_xlabel("seconds")
    same = "identical scores" if result["identical_scores"] else "DIFFERENT SCORES"
    axis.set_title(f"Evaluation of {result['prompts']} prompts: {result['speedup']:.1f} times faster, {same}")
    return figure


def closed_loop(result: dict) -> Figure:
    figure, axes = new_figure(2, width=5.5, height=4.4)
    records = {record["setting"]: record["points"] for record in result["settings_done"]}
    unedited = records.pop("unedited")[0]
    for axis, metric in zip(axes, ("specificity", "generalization"), strict=True):
        for index, (name, points) in enumerate(records.items()):
            colour = style(index).color
            solved = [point for point in points if not point["after"].startswith("share")]
            axis.plot(*along(solved, metric), "o-", markersize=4, color=colour, label=name)
            if len(solved) < len(points):
                shrunk = [solved[-1], *points[len(solved) :]]
                axis.plot(*along(shrunk, metric), "x:", markersize=5, color=colour, label=f"{name}, shrunk")
        axis.set_xlabel("efficacy")
        axis.set_ylabel(metric)
    axes[0].axhline(unedited["specificity"], color=_LIMIT, linestyle="--", label="unedited")
    settings = result["settings"]
    axes[0].set_title(f"{settings['edits']} ZsRE edits after {settings['warm_up']} of warm-up", fontsize=10)
    axes[1].set_title("dots: after the stream, each round of repairs; crosses: shares kept", fontsize=10)
    axes[0].legend(fontsize=7)
    return figure


def scores(result: dict) -> Figure:
    """Of the default, in chats, for the README: what is gained, and what stays elsewhere."""
    figure, (axis,) = new_figure(1, width=7.5, height=3.4)
    row = next(row for name, row in result["rows"].items() if name.startswith("zsre-chat"))
    shown = {
        "efficacy_free": "asked as edited:\nanswer right, and stops",
        "generalization_free": "in other words:\nanswer right, and stops",
        "generalization": "in other words:\ntokens right",
        "locality_agreement": "unrelated questions:\ntokens as unedited",
    }
    for index, (label, state, colour) in enumerate((("unedited", "unedited", GREY), ("edited", "edited", _OURS))):
        places = [place + (index - 0.5) * 0.36 for place in range(len(shown))]
        drawn = axis.bar(places, [row[state]["means"][metric] for metric in shown], 0.34, color=colour, label=label)
        axis.bar_label(drawn, fmt="%.2f", fontsize=8)
    axis.set_xticks(range(len(shown)), shown.values(), fontsize=8)
    axis.set_ylim(0, 1.1)
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left", fontsize=8)
    axis.set_title(f"SmolLM2-135M, {row['edits']:,} ZsRE edits with StableEditConfig(), as chats", fontsize=11)
    return figure


def along(points: list[dict], metric: str) -> tuple[list[float], list[float]]:
    return [point["efficacy"] for point in points], [point[metric] for point in points]


def lora_rank(result: dict) -> Figure:
    figure, (left, right) = new_figure(2, width=5.5, height=4)
    rows, chosen = result["ranks"], result["chosen"]
    ranks = [row["rank"] for row in rows]
    for index, metric in enumerate(("efficacy", "specificity", "generalization")):
        colour = style(index).color
        left.plot(ranks, [row[metric] for row in rows], "o-", color=colour, label=f"adapter, {metric}", markersize=4)
        left.axhline(result["edited"][metric], color=colour, linestyle="--", linewidth=1)
        left.axhline(result["unedited"][metric], color=colour, linestyle=":", linewidth=1)
    left.set_ylabel("score (dashed: edited model, dotted: unedited)")
    left.set_title(f"{result['edits']} edits after {result['warm_up_edits']} of warm-up")
    right.plot(ranks, [row["kept_norm"] for row in rows], "o-", color=_LIMIT, label="norm of the change", markersize=4)
    right.plot(ranks, [row["kept_efficacy"] for row in rows], "o-", color=_OURS, label="efficacy", markersize=4)
    right.axhline(chosen["keep"], color=_LIMIT, linestyle=":", linewidth=1)
    right.axvline(chosen["rank"], color=_OURS, linestyle=":", linewidth=1)
    right.set_ylabel("kept share")
    size = chosen["float32"]["bytes"] / 1e6
    right.set_title(f"{100 * chosen['keep']:.0f} % of the efficacy: rank {chosen['rank']}, {size:.1f} MB in float32")
    for axis in (left, right):
        axis.set_xlabel(f"rank of the adapter (full: {result['full_rank']})")
        axis.legend(fontsize=8)
        axis.set_ylim(bottom=0)
    return figure


def bars(axis: Axes, rows: list[tuple[str, float, str]], unit: str, steep: bool = False) -> None:
    """Horizontal bars, the first on top, each with its value."""
    labels, values, colours = zip(*rows, strict=True)
    drawn = axis.barh(labels, values, color=colours)
    axis.bar_label(drawn, [f" {value:.3g} {unit}" for value in values], fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    if steep:
        logarithmic(axis.xaxis)


# File of the chart -> the benchmark whose result it shows, and how.
CHARTS: dict[str, tuple[str, Callable[[dict], Figure]]] = {
    draw.__name__: (draw.__name__, draw)
    for draw in (editing_math, whitening, capture, stream, scaling, evaluation, closed_loop, lora_rank, take)
} | {"scores": ("take of the default", scores)}

if __name__ == "__main__":
    main()
