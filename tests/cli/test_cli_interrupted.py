"""`stableedit edit` that Ctrl-C or an error ends: no turn that was applied is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors import turn as turn_module
from stableedit_cpp.errors import ModelBroken
from support.commands import assert_one_error, started, tree
from support.edit_command import REQUESTS, assert_same_weights, edited_by_hand, report_of, weights_of
from support.tiny import FACTS, tiny_model


def interrupt_in_turn(monkeypatch, number: int) -> None:
    """Press Ctrl-C while the given turn is captured, counted from 1 over warm-up and stream."""
    turns = []
    capture = turn_module.capture

    def pressed(*args, **kwargs):
        turns.append(1)
        if len(turns) == number:
            signal.raise_signal(signal.SIGINT)
        return capture(*args, **kwargs)

    monkeypatch.setattr(turn_module, "capture", pressed)


def test_interrupted_stream_is_saved(edit, work, capsys, monkeypatch, default_sigint):
    interrupt_in_turn(monkeypatch, 2)
    assert edit("--turn-size", 5, "--evaluate") == 130
    words = "stopped after turn 2 of 3, which was finished and applied: 10 of 13 requests are edited"
    assert f"stableedit: interrupted: {words}" in capsys.readouterr().err
    report = report_of()
    assert report["interrupted"] == words
    assert report["edit"]["edits"] == 10
    assert [turn["requests"] for turn in report["edit"]["turns"]] == [5, 5]
    assert "scores" not in report
    monkeypatch.undo()
    expected = edited_by_hand(se.StableEditConfig.one_pass(turn_size=5), REQUESTS[:10])
    assert_same_weights(weights_of(work / "out"), expected)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_interrupted_warm_up_does_not_go_on_to_the_stream(edit, work, capsys, monkeypatch, default_sigint, turn):
    (work / "warm.json").write_text(json.dumps(FACTS))
    interrupt_in_turn(monkeypatch, turn)
    assert edit("--turn-size", 5, "--warm-up", "warm.json") == 130
    assert f"stableedit: interrupted: in the warm-up: stopped after turn {turn} of 3" in capsys.readouterr().err
    report = report_of()
    assert report["interrupted"].startswith(f"in the warm-up: stopped after turn {turn} of 3")
    assert report["warm_up"]["edits"] == min(5 * turn, 13)
    assert "edit" not in report


def test_interrupt_in_the_last_turn_is_not_forgotten(edit, work, capsys, monkeypatch, default_sigint):
    interrupt_in_turn(monkeypatch, 3)
    assert edit("--turn-size", 5, "--evaluate") == 130
    report = report_of()
    assert "13 of 13 requests are edited" in report["interrupted"]
    assert "scores" not in report


def fail_in_turn(monkeypatch, number: int, error: Exception) -> None:
    """Raise while the given turn is captured, counted from 1 over warm-up and stream."""
    turns = []
    capture = turn_module.capture

    def failing(*args, **kwargs):
        turns.append(1)
        if len(turns) == number:
            raise error
        return capture(*args, **kwargs)

    monkeypatch.setattr(turn_module, "capture", failing)


@pytest.mark.parametrize(
    "error",
    [torch.linalg.LinAlgError("not positive definite"), MemoryError("no room"), ModelBroken("NaN"), KeyError(1)],
)
def test_an_error_in_a_late_turn_loses_none_before_it(edit, work, capsys, monkeypatch, error):
    fail_in_turn(monkeypatch, 3, error)
    assert edit("--turn-size", 5, "--evaluate") == 1
    assert f"stableedit: error: {error}; saving the model as it is" in capsys.readouterr().err
    report = report_of()
    assert report["error"] == str(error)
    assert report["edit"]["edits"] == 10
    assert "scores" not in report
    monkeypatch.undo()
    expected = edited_by_hand(se.StableEditConfig.one_pass(turn_size=5), REQUESTS[:10])
    assert_same_weights(weights_of(work / "out"), expected)


def test_an_error_in_the_first_turn_saves_nothing(edit, work, capsys, monkeypatch):
    before = tree(work)
    fail_in_turn(monkeypatch, 1, torch.linalg.LinAlgError("not positive definite"))
    assert edit("--turn-size", 5) == 2
    assert "not positive definite" in assert_one_error(capsys.readouterr().err)
    assert tree(work) == before


@pytest.mark.parametrize(("error", "status"), [(MemoryError("no room"), 1), (KeyboardInterrupt(), 130)])
def test_an_edited_model_is_saved_whatever_happens_while_it_is_scored(edit, work, capsys, monkeypatch, error, status):
    def failing(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("stableedit_cpp.cli.edit.evaluate", failing)
    assert edit("--evaluate") == status
    assert "while scoring: " in capsys.readouterr().err
    assert report_of()["edit"]["edits"] == 13
    assert_same_weights(weights_of(work / "out"), edited_by_hand(se.StableEditConfig.one_pass(), REQUESTS))


def test_interrupt_before_the_stream(edit, work, capsys, monkeypatch, default_sigint):
    def press(*_args, **_kwargs):
        signal.raise_signal(signal.SIGINT)

    before = tree(work)
    monkeypatch.setattr("stableedit_cpp.cli.edit.load", press)
    assert edit() == 130
    assert capsys.readouterr().err == "stableedit: interrupted\n"
    assert tree(work) == before


@pytest.mark.slow
def test_sigint_to_a_running_command(model_directory, work):
    (work / "many.json").write_text(json.dumps(FACTS * 400))
    command = [sys.executable, "-m", "stableedit_cpp", "edit", "--model", model_directory, "--requests", "many.json"]
    command += ["--output", "out", "--turn-size", "1", "--device", "cpu"]
    with started(command, cwd=work, stderr=subprocess.PIPE) as process:
        seen, deadline = b"", time.monotonic() + 120
        while not re.search(rb"Editing: +\d+%\|[^|]*\| [1-9]\d*/5200", seen):
            assert time.monotonic() < deadline, seen
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, f"ended before the first turn: {seen!r}"
            seen += piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    err = (seen + err).decode()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    report = report_of()
    done = report["edit"]["edits"]
    words = f"stopped after turn {done} of 5200, which was finished and applied: {done} of 5200 requests are edited"
    assert 0 < done < 5200
    assert report["interrupted"] == words
    assert f"stableedit: interrupted: {words}; saving the model as it is" in err
    assert f"{done} edits in" in out.decode()
    (edited,) = report_of()["edit_modules"]
    changed = weights_of("out")[f"{edited}.weight"]
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, tiny_model("llama").state_dict()[f"{edited}.weight"])
