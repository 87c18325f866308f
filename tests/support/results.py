"""Result directories as `stableedit bench` writes them, with made-up figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path


def score(mean: float | None, count: int = 500) -> dict[str, object]:
    error = None if mean is None else math.sqrt(max(mean * (1 - mean), 1e-4) / count)
    return {"mean": mean, "standard_error": error, "count": 0 if mean is None else count}


def scores(level: float, draw: random.Random) -> dict[str, dict[str, object]]:
    noise = draw.uniform(-0.01, 0.01)
    return {
        "efficacy": score(level + noise),
        "generalization": score(0.9 * level + noise),
        "specificity": score(0.24 + noise),
        "portability": score(None),
        "efficacy_free": score(0.6 * level + noise),
        "efficacy_contains": score(0.7 * level + noise),
        "locality_same": score(0.7 - 0.4 * level),
        "locality_agreement": score(0.85 - 0.2 * level),
        "locality_kl": score(0.3 * level),
    }


def side_effects(edits: int, draw: random.Random, drift: float) -> dict[str, object]:
    prompts = 60
    before = [[draw.gauss(0, 1), draw.gauss(0, 1)] for _ in range(prompts)]
    after = [[x + drift + draw.gauss(0, 0.1), y + draw.gauss(0, 0.1)] for x, y in before]
    figures = {"relative_shift": drift, "cka": 1 - drift / 2, "mmd2": drift / 50, "bandwidth": 1.0}
    figures |= {"p_value": 0.4, "p_value_paired": 0.001}
    figures["maps"] = {method: {"before": before, "after": after} for method in ("pca", "umap")}
    tasks = {}
    for task in ("sst2", "mrpc", "cola", "rte", "nli", "mmlu"):
        tasks[task] = {"accuracy": 0.55 - 0.1 * drift, "standard_error": 0.02, "f1": 0.5, "mcc": 0.1, "records": 400}
    return {
        "perplexity": {
            "wikitext2": {"perplexity": 21.5 * (1 + drift), "standard_error": 0.5, "tokens": 1, "windows": 1}
        },
        "downstream": tasks,
        "hidden_states": {"prompts": prompts, "layers": {"30": figures} if edits else {}},
        "seconds": {},
    }


def write_run(
    directory: Path,
    editor: str = "stableedit",
    *,
    dataset: str = "zsre",
    seed: int = 0,
    level: float = 0.5,
    edits: int = 1000,
    turns: int = 12,
    status: str = "done",
) -> Path:
    """One run directory in ``directory``; returns it."""
    draw = random.Random(f"{editor} {dataset} {seed}")
    name = f"{editor}-{dataset}-smollm2-135m-seed{seed}"
    places = [0, edits // 4, edits // 2, edits]
    ages = [(0, 100), (100, 200), (200, 400), (400, 800), (800, 1600)]
    checkpoints = []
    for place in places if status == "done" else places[:-1]:
        reached = level * (1 - 0.2 * place / edits) if place else 0.15
        bins = [{"from": a, "to": b, "scores": scores(reached - 0.01 * i, draw)} for i, (a, b) in enumerate(ages)]
        checkpoints.append(
            {
                "edits": place,
                "warm_up": 100 if place else 0,
                "turn": place // 100,
                "scores": scores(reached, draw),
                "ages": bins if place else [],
                "side_effects": side_effects(place, draw, 0.1 * place / edits),
                "seconds": {"scoring": 1.5, "side_effects": 3.0},
                "resident_bytes": 2**30,
            }
        )
    document = {
        "format": "stableedit-bench-run",
        "version": 1,
        "status": status,
        "name": name,
        "settings": {
            "editor": editor,
            "config": {"editor": "stableedit", "step_size": 3.5e-4},
            "model": "smollm2-135m",
            "dataset": dataset,
            "data": {"source": f"{dataset}.json", "digest": "ab" * 32, "format": dataset, "edits": edits},
            "warm_up": {"position": "start", "size": 100, "source": "train.json", "digest": "cd" * 32},
            "seed": seed,
        },
        "provenance": {
            "started": "2026-01-02T03:04:05",
            "finished": None,
            "command": ["stableedit", "bench", "--editor", editor],
            "git": "0123456789abcdef",
            "git_dirty": False,
            "environment": {"stableedit_cpp": "0.1.0", "torch": "2.13.0", "processor": "a processor"},
            "stints": [{"from_edits": 0}, {"from_edits": edits // 2}],
        },
        "checkpoints": checkpoints,
        "cost": {
            "edits": edits,
            "warm_up_edits": 100,
            "seconds": edits / 50,
            "edits_per_second": 50.0,
            "seconds_by_part": {
                "capture": 0.8 * edits / 50,
                "mathematics": 0.15 * edits / 50,
                "apply": 0.05 * edits / 50,
            },
            "scoring_seconds": 12.0,
            "side_effects_seconds": 30.0,
            "peak_resident_bytes": 2 * 2**30,
            "peak_device_bytes": None,
        },
    }
    path = directory / name
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(document))
    lines = []
    for turn in range(1, turns + 1):
        statistics = {"mean_drift": 1 / turn, "covariance_drift": None if turn < 3 else 2 / turn}
        geometry = {
            "norm": 1 + 0.1 * draw.random(),
            "cumulative_norm": math.sqrt(turn),
            "cosine_last": None if turn == 1 else draw.uniform(-0.1, 0.1),
            "cosine_earlier": [draw.uniform(-0.1, 0.1) for _ in range(min(turn - 1, 3))],
            "statistics": {"576x1536": statistics},
        }
        place = turn * edits // turns
        lines.append({"edits": place, "warm_up": 100, "resident_bytes": 2**30 + turn * 10**6, "geometry": geometry})
    (path / "turns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_theory(directory: Path, run: str) -> Path:
    points = [{"edits": n, "samples": 3 * n, "distance": n**-0.5} for n in (100, 200, 400, 800)]
    after = [(0, 0, 0.3), (0, 100, 0.38), (500, 100, 0.45), (1000, 100, 0.5)]
    cumulative = [
        {"prior_edits": n, "warm_up": w, "before": {}, "after": {"efficacy": score(mean), "specificity": score(None)}}
        for n, w, mean in after
    ]
    cosine = {"mean": 0.01, "standard_error": 0.002, "mean_abs": 0.03, "count": 10}
    norm = {"mean": 1.0, "max": 1.3, "first_tenth": 1.1, "last_tenth": 0.9}
    fit = {"points": points, "rate": 0.5, "rate_standard_error": 0.01, "reference_samples": 9}
    summary = {
        "run": run,
        "geometry": {"turns": 10, "norm": norm, "cosine_last": cosine, "cosine_earlier": None},
        "drift": {},
        "convergence": {"576x1536": fit},
        "cumulative": {"edits": 500, "points": cumulative},
    }
    document = {"format": "stableedit-bench-theory", "version": 1, "runs": [summary]}
    (directory / "theory.json").write_text(json.dumps(document))
    return directory / "theory.json"
