"""`stableedit evaluate` with all metrics, and its bad options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stableedit_cpp.cli import main
from support.tiny import save_tiny


@pytest.fixture
def saved(tmp_path, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("edited", 0), ("original", 1)):
        save_tiny(name, seed=seed, bos=True)
    unrelated = [{"locality_prompt": f"unrelated {n}", "locality_target": "xyz"} for n in range(6)] + [{}]
    records = [{"q": "p", "a": "t", "prompt": "p", "target": "t", **more} for more in unrelated]
    Path("facts.json").write_text(json.dumps(records))
    capsys.readouterr()
    return tmp_path


def test_evaluate_with_all_metrics(saved, capsys):
    options = ["--model", "edited", "--requests", "facts.json", "--device", "cpu", "--fields", "prompt=q,target=a"]
    assert main(["evaluate", *options]) == 0
    missing = r"^specificity +not scored"  # --fields says nothing of unrelated prompts
    assert re.search(missing, capsys.readouterr().out, re.MULTILINE)
    options = [*options[:-2], "--metrics", "exact-match", "generation", "--reference", "original", "--output", "s.json"]
    assert main(["evaluate", *options]) == 0
    out = capsys.readouterr().out
    scores = json.loads(Path("s.json").read_text())
    for name in (
        "efficacy",
        "efficacy_exact_match",
        "efficacy_contains_and_stops",
        "locality_agreement",
        "locality_kl",
    ):
        assert f"{name} " in out
        assert scores[name] is not None
        assert scores["standard_errors"][name] is not None
    assert scores["counts"]["locality_kl"] == {"scored": 6, "skipped": 1}
    assert scores["reference"] == "original"
    assert "efficacy_text" in scores["per_request"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "locality"], "--metrics locality compares with the unedited model; say with --reference"),
        (["--reference", "/no/such/model"], "cannot load the model '/no/such/model'"),
        (["--format", "zrse"], "unknown data set format 'zrse', did you mean 'zsre'?"),
        (["--format", "zsre"], "facts.json, record 0: the record lacks the field 'src' (prompt) and 'ans' (target) of"),
    ],
)
def test_bad_options_of_evaluate(saved, capsys, options, words):
    assert main(["evaluate", "--model", "edited", "--requests", "facts.json", "--device", "cpu", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
