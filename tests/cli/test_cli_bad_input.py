"""Bad input to `stableedit edit`: one line, exit 2, nothing written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from support.commands import assert_one_error, tree
from support.edit_command import LAST, LONG, REQUESTS
from support.tiny import FACTS, tiny_model, tiny_tokenizer


def write(name: str, content: str | bytes):
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def nothing() -> None:
    pass


GOOD = json.dumps(FACTS[0])
BAD = {
    "unknown module": (nothing, ["--edit-modules", "model.layers.9.mlp"], ["'model.layers.9.mlp'", "mlp.down_proj"]),
    "one unknown module": (nothing, ["--edit-modules", LAST, "nope"], ["no linear map for 'nope'"]),
    "pattern without match": (nothing, ["--edit-modules", "*.nope"], ["'*.nope'", "(24 -> 16)"]),
    "module not linear": (
        nothing,
        ["--edit-modules", "model.norm"],
        ["model.norm is a LlamaRMSNorm, not a linear map"],
    ),
    "block": (nothing, ["--edit-modules", "model.layers.1"], ["model.layers.1 is a LlamaDecoderLayer"]),
    "missing requests": (nothing, ["--requests", "missing.json"], ["there is no file missing.json"]),
    "directory of requests": (nothing, ["--requests", "."], [". is a directory"]),
    "empty requests": (write("bad.json", ""), ["--requests", "bad.json"], ["bad.json is empty"]),
    "no requests": (write("bad.json", "[]"), ["--requests", "bad.json"], ["bad.json holds no edit requests"]),
    "blank requests": (write("bad.jsonl", "\n\n"), ["--requests", "bad.jsonl"], ["holds no edit requests"]),
    "latin-1 requests": (write("bad.csv", b"prompt,target\n\xe9,t\n"), ["--requests", "bad.csv"], ["not UTF-8 text"]),
    "malformed requests": (
        write("bad.jsonl", f"{GOOD}\n{GOOD}\n{{]\n"),
        ["--requests", "bad.jsonl"],
        ["bad.jsonl, line 3, column 2: not valid JSON"],
    ),
    "malformed json": (
        write("bad.json", f"[{GOOD},\n{GOOD}\n{GOOD}]"),
        ["--requests", "bad.json"],
        ["line 3, column 1"],
    ),
    "lacks a field": (
        write("bad.jsonl", '{"prompt": "p", "answer": "a"}'),
        ["--requests", "bad.jsonl"],
        ["line 1: the record lacks", "its fields are: prompt, answer"],
    ),
    "empty target": (
        write("bad.jsonl", f'{GOOD}\n{{"prompt": "p", "target": " "}}'),
        ["--requests", "bad.jsonl"],
        ["line 2: target is empty"],
    ),
    "not text": (
        write("bad.jsonl", '{"prompt": "p", "target": true}'),
        ["--requests", "bad.jsonl"],
        ["must be text, not bool"],
    ),
    "half a character": (
        write("bad.jsonl", '{"prompt": "p", "target": "\\ud800"}'),
        ["--requests", "bad.jsonl"],
        ["target is not valid Unicode"],
    ),
    "duplicate ids": (
        write("bad.json", json.dumps([REQUESTS[0], REQUESTS[1], REQUESTS[0]])),
        ["--requests", "bad.json"],
        ["record 2: the id 'f0' was used before, in record 0"],
    ),
    "no gzip": (write("bad.json.gz", "[]"), ["--requests", "bad.json.gz"], ["not a complete gzip file"]),
    "unknown suffix": (write("bad.txt", GOOD), ["--requests", "bad.txt"], ["cannot tell the format"]),
    "bad warm-up": (write("bad.jsonl", "{"), ["--warm-up", "bad.jsonl"], ["bad.jsonl, line 1"]),
    "prompt too long": (
        write("bad.json", LONG),
        ["--requests", "bad.json"],
        ["request 1 (long)", "tokens", "context of 64"],
    ),
    "step size zero": (nothing, ["--step-size", "0"], ["step_size must be greater than 0, not 0.0"]),
    "step size negative": (nothing, ["--step-size=-1e-4"], ["step_size must be greater than 0, not -0.0001"]),
    "step size nan": (nothing, ["--step-size", "nan"], ["step_size must be a finite number, not nan"]),
    "step size inf": (nothing, ["--step-size", "inf"], ["step_size must be a finite number, not inf"]),
    "output a file": (write("taken", "mine"), ["--output", "taken"], ["--output taken is a file"]),
    "output with content": (nothing, ["--output", "."], ["--output . exists and is not empty"]),
    "output below a file": (write("taken", "mine"), ["--output", "taken/out"], ["--output taken/out", "taken"]),
    "output deep below a file": (
        write("taken", ""),
        ["--output", "taken/a/b"],
        ["--output taken/a/b", "taken: Not a dir"],
    ),
    "output not writable": (nothing, ["--output", "/proc/out"], ["--output /proc/out"]),
    "output deep not writable": (nothing, ["--output", "/proc/a/b/out"], ["--output /proc/a/b/out"]),
    "missing model": (nothing, ["--model", "/no/such/model"], ["cannot load the model '/no/such/model'"]),
    "model a file": (nothing, ["--model", "requests.json"], ["cannot load the model 'requests.json'"]),
    "unknown device": (nothing, ["--device", "abacus"], ["cannot use device 'abacus'"]),
    "missing device": (nothing, ["--device", "cuda:99"], ["cannot use device 'cuda:99'"]),
    "missing config": (nothing, ["--config", "missing.json"], ["missing.json: No such file or directory"]),
    "config a directory": (nothing, ["--config", "."], [".: Is a directory"]),
    "malformed config": (
        write("bad.json", '{"ridge": 1,\n}'),
        ["--config", "bad.json"],
        ["bad.json: line 2", "not valid JSON"],
    ),
    "config not UTF-8": (write("bad.json", b'"\xe9"'), ["--config", "bad.json"], ["bad.json is not UTF-8 text"]),
    "config a list": (write("bad.json", "[]"), ["--config", "bad.json"], ["bad.json", "expected a JSON object"]),
    "config field": (
        write("bad.json", '{"stepsize": 1}'),
        ["--config", "bad.json"],
        ["bad.json", "did you mean 'step_size'?"],
    ),
    "config value": (
        write("bad.json", '{"ridge": 0}'),
        ["--config", "bad.json"],
        ["bad.json: ridge must be greater than 0"],
    ),
    "config type": (
        write("bad.json", '{"edit_modules": 5}'),
        ["--config", "bad.json"],
        ["bad.json: edit_modules must be"],
    ),
    "config editor": (write("bad.json", '{"editor": "rome"}'), ["--config", "bad.json"], ["unknown editor 'rome'"]),
    "shrink": (nothing, ["--shrink", "1.5"], ["--shrink must be greater than 0 and at most 1, not 1.5"]),
    "preset and editor": (
        nothing,
        ["--preset", "closed-loop", "--editor", "ultraedit"],
        ["--editor ultraedit, but --preset closed-loop is one of stableedit"],
    ),
    "config version": (write("bad.json", '{"version": 9}'), ["--config", "bad.json"], ["of version 9"]),
    "config and editor": (
        write("good.json", se.UltraEditConfig().to_json()),
        ["--config", "good.json", "--editor", "stableedit"],
        ["--editor stableedit, but good.json is a config of ultraedit"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_edit(edit, work, capsys, case):
    prepare, options, words = BAD[case]
    prepare()
    before = tree(work)
    output = [] if "--output" in options else ["--output", "new/deep/out"]
    capsys.readouterr()
    assert edit(*output, *options) == 2
    captured = capsys.readouterr()
    line = assert_one_error(captured.err)
    for word in words:
        assert word in line
    assert captured.out == ""
    assert tree(work) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("output", ["frozen", "frozen/out"])
def test_read_only_output(edit, work, capsys, output):
    (work / "frozen").mkdir(mode=0o555)
    assert edit("--output", output) == 2
    assert f"--output {output}" in assert_one_error(capsys.readouterr().err)
    assert tree(work / "frozen") == {}


@pytest.mark.parametrize("preset", ["stableedit", "one-pass"])
def test_not_finite_model(work, capsys, preset):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("broken")
    tiny_tokenizer().save_pretrained("broken")
    before = tree(work)
    capsys.readouterr()
    arguments = ["--model", "broken", "--requests", "requests.json", "--output", "out", "--device", "cpu"]
    assert main(["edit", *arguments, "--preset", preset]) == 2
    line = assert_one_error(capsys.readouterr().err)
    if preset == "one-pass":
        assert re.search(r"request \d+ \(f\d+\): .* NaN or infinite", line)
    assert "NaN or infinit" in line  # an editor with anchors, or a guard, finds out before it looks at the requests
    assert tree(work) == before
