"""``--device-map``: what is spread is edited, scored and kept like what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stableedit_cpp as se
from stableedit_cpp.cli import main
from support.edit_command import assert_same_weights, edited_by_hand, weights_of
from support.sessions import stream

NAMES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb"]


@pytest.fixture(params=["map", "limit"])
def spread(request, work) -> list[str]:
    """Half of the model on the disk, by a map or for want of memory."""
    places = {name: "disk" if name.endswith(("1", "2")) else "cpu" for name in NAMES} | {"lm_head": "disk"}
    Path("map.json").write_text(json.dumps(places))
    if request.param == "map":
        return ["--device-map", "map.json"]
    Path("files").mkdir()
    return ["--device-map", "auto", "--max-memory", "cpu=45KB", "--offload-folder", "files"]


def test_edit_and_evaluate(spread, work, model_directory, capsys):
    model = ["--model", str(model_directory)]
    edit = ["edit", *model, *spread, "--requests", "requests.json", "--preset", "one-pass"]
    assert main([*edit, "--output", "out", "--evaluate"]) == 0
    assert_same_weights(weights_of("out"), edited_by_hand(se.StableEditConfig.one_pass()))
    scores = []
    for where in (["--device", "cpu"], spread):
        capsys.readouterr()
        assert main(["evaluate", "--model", "out", *where, "--requests", "requests.json", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        scores.append({name: found[name] for name in ("efficacy", "generalization", "specificity")})
    assert scores[0] == scores[1]


def test_a_session_goes_on_wherever_its_model_lies(spread, work, model_directory, capsys):
    create = ["session", "create", "edits", "--model", str(model_directory), "--preset", "one-pass"]
    assert main([*create, *spread]) == 0
    Path("one.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in stream(3)))
    Path("two.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in stream(3, 3)))
    assert main(["session", "edit", "edits", *spread, "--requests", "one.jsonl"]) == 0
    assert main(["session", "edit", "edits", "--device", "cpu", "--requests", "two.jsonl"]) == 0
    assert main(["session", "revert", "edits", *spread, "f1"]) == 0
    assert main(["session", "audit", "edits", *spread]) == 0


@pytest.mark.parametrize(
    "options, said",
    [
        (["--device-map", "nowhere"], "--device-map nowhere: there is no such file; expected auto, balanced"),
        (["--device-map", "requests.json"], "requests.json does not give each module a device"),
        (["--device", "cpu", "--device-map", "auto"], "not allowed with argument --device"),
        (["--max-memory", "cpu=1GB"], "--max-memory says how --device-map spreads a model"),
        (["--offload-folder", "x"], "--offload-folder says how --device-map spreads a model"),
        (["--device-map", "auto", "--max-memory", "cpu"], "--max-memory cpu: expected DEVICE=SIZE"),
    ],
)
def test_bad_input(options, said, work, model_directory, capsys):
    arguments = ["edit", "--model", str(model_directory), "--requests", "requests.json", "--output", "out", *options]
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 or code == 1
    assert said in capsys.readouterr().err


def test_not_under_torchrun(monkeypatch, work):
    from argparse import Namespace

    from stableedit_cpp.cli.placement import placement

    monkeypatch.setenv("WORLD_SIZE", "2")
    options = Namespace(device=None, device_map="auto", max_memory=[], offload_folder=None)
    with pytest.raises(ValueError, match="each process has the whole model on a device of its own"):
        placement(options)
