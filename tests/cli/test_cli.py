"""The command line: help, env, evaluate, demo."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import _COMMANDS, _parser, main
from support.commands import assert_one_error, tree
from support.edit_command import LONG, NAMES, REQUESTS
from support.tiny import tiny_model, tiny_tokenizer

COMMANDS = [
    "demo",
    "edit",
    "choose-modules",
    "train-hypernetwork",
    "evaluate",
    "export",
    "editors",
    "datasets",
    "bench",
    "side-effects",
    "report",
    "env",
]


# --- help, env, python -m ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    example = text[text.index("example:") :]
    assert f"  stableedit {command}" in example


def test_help_waits_for_no_torch():
    """--help of every command, and of one within a command, in one process that has loaded neither torch nor numpy."""
    program = (
        "import sys\nfrom stableedit_cpp.cli import main\n"
        f"for words in {[[command] for command in COMMANDS] + [['session', 'edit']]!r}:\n"
        "    try:\n        main([*words, '--help'])\n    except SystemExit as end:\n        assert end.code == 0\n"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_every_result_is_had_as_json():
    """By every command, and every one within a command, the studio aside, which has none."""

    def leaves(parser):
        within = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return [leaf for found in within for inner in found.values() for leaf in leaves(inner)] or [parser]

    found = {name: _parser([name])._subparsers._group_actions[0].choices[name] for name in _COMMANDS}
    parsers = [leaf for command in found.values() for leaf in leaves(command)]
    without = [parser.prog.split()[1:] for parser in parsers if "--json" not in parser._option_string_actions]
    assert without == [["studio"]] and len(parsers) > len(_COMMANDS)


def test_editors(capsys):
    assert main(["editors", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert listed["one-pass"]["editor"] == "stableedit" and listed["memit-seq"]["config"]["editor"] == "memit"
    assert main(["editors"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ *{name} ", out, re.MULTILINE) for name in listed)


def test_an_unknown_editor_is_named_before_anything_is_read(work, capsys):
    arguments = ["edit", "--model", "m", "--requests", "r", "--output", "o"]
    assert main([*arguments, "--editor", "no-such-editor"]) == 2
    assert "unknown editor 'no-such-editor'" in assert_one_error(capsys.readouterr().err)
    assert main([*arguments, "--preset", "one_pas"]) == 2
    assert "one-pass" in assert_one_error(capsys.readouterr().err)


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "stableedit demo" in text
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\w", text, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["edit"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--limit", "0"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--limit", "many"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--step-size", "small"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--turn-size", "-1"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--edit-modules"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--dtype", "int8"],
    ],
)
def test_wrong_options(work, capsys, arguments):
    before = tree(work)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree(work) == before


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"^{re.escape(name)}: +\S", text, re.MULTILINE), name
    assert torch.__version__ in text
    assert se.__version__ in text


def test_env_as_json(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(NAMES) <= set(found)
    assert found["torch"] == torch.__version__
    assert found["stableedit_cpp"] == se.__version__
    assert found["memory (GiB)"] > 0


def test_command_is_installed(work):
    command = Path(sys.executable).with_name("stableedit")
    if not command.exists():
        pytest.skip("the package is not installed into this environment")
    arguments = ["evaluate", "--model", "m", "--requests", "missing.json"]
    # With what OpenMP says when it is loaded: what the command sets comes in time.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "true"
    result = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.search(r"OMP_WAIT_POLICY ?= ?'PASSIVE'", result.stderr)
    assert result.stderr.splitlines()[-1] == "stableedit: error: there is no file missing.json"


def test_libraries_say_nothing_of_themselves(work):
    """torchao is imported wherever transformers finds it, and names the kernels that it was not built with."""
    command = [sys.executable, "-m", "stableedit_cpp", "env", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=work)
    assert (result.returncode, result.stderr) == (0, "")


def test_nobody_reads_the_output_of_python_dash_m(work):
    command = f"{sys.executable} -m stableedit_cpp env | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=work)
    assert (result.stdout, result.stderr) == ("141\n", "")


# --- evaluate ---


def test_evaluate(model_directory, work, capsys):
    arguments = ["evaluate", "--model", str(model_directory), "--requests", "requests.json", "--device", "cpu"]
    assert main([*arguments, "--output", "new/scores.json"]) == 0
    out, err = capsys.readouterr()
    expected = se.evaluate(tiny_model("llama"), tiny_tokenizer(bos=True), REQUESTS, progress=False)
    assert str(expected) in out
    assert "locality: not scored; say with --reference which the unedited model is" in err
    assert "scores and per-request values are in new/scores.json" in err
    document = json.loads(Path("new/scores.json").read_text(encoding="utf-8"))
    assert {name: document[name] for name in expected.to_dict()} == expected.to_dict()
    assert [record["id"] for record in document["per_request"]] == [request["id"] for request in REQUESTS]
    assert document["model"] == str(model_directory)
    assert document["requests"] == "requests.json"
    assert set(NAMES) <= set(document["environment"])
    assert os.listdir("new") == ["scores.json"]
    # An existing file is replaced; without --output nothing is written.
    assert main([*arguments, "--output", "new/scores.json", "--limit", "2"]) == 0
    assert len(json.loads(Path("new/scores.json").read_text(encoding="utf-8"))["per_request"]) == 2
    before = tree(work)
    assert main(arguments) == 0
    assert tree(work) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--requests", "missing.json"], "there is no file missing.json"),
        (["--output", "."], "--output . is a directory"),
        (["--output", "requests.json/scores.json"], "--output requests.json/scores.json"),
        (["--output", "/proc/scores.json"], "--output /proc/scores.json"),
        (["--model", "/no/such/model"], "cannot load the model"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
        (["--requests", "long.json"], "request 1 (long), efficacy: prompt and target have"),
    ],
)
def test_bad_input_to_evaluate(model_directory, work, capsys, options, words):
    (work / "long.json").write_text(LONG)
    before = tree(work)
    arguments = [
        "--model",
        str(model_directory),
        "--requests",
        "requests.json",
        "--device",
        "cpu",
        "--output",
        "new/a.json",
    ]
    assert main(["evaluate", *arguments, *options]) == 2
    assert words in assert_one_error(capsys.readouterr().err)
    assert tree(work) == before


# --- demo ---


def test_demo_runs_on_any_model(work, capsys):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 512
    model.save_pretrained("model")
    tiny_tokenizer(bos=True).save_pretrained("model")
    capsys.readouterr()
    arguments = ["--model", "model", "--device", "cpu", "--stream", "requests.json", "--warm-up", "requests.json"]
    assert main(["demo", *arguments, "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ answers begin with the new fact", out)
    assert re.search(r"\d+ of \d+ answers are unchanged, word for word", out)
    assert "A stream of 5 edits" in out
    assert re.search(r"efficacy +\d\.\d{3} ± \d\.\d{3} +\d\.\d{3} ± \d\.\d{3}", out)
    assert main(["demo", *arguments[:4], "--json"]) == 0  # the tale is told beside it
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["facts"]["edits"] == len(document["facts"]["answers"]) and "1. 24 facts" in err
    assert set(document["facts"]["scores"]) == {"before", "after"} and "stream" not in document


@pytest.mark.parametrize("options", [["--stream", "missing.json"], ["--warm-up", "missing.json"]])
def test_bad_input_to_demo(work, capsys, options):
    assert main(["demo", "--model", "/no/such/model", *options]) == 2
    assert "there is no file missing.json" in assert_one_error(capsys.readouterr().err)
