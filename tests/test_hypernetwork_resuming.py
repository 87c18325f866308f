"""A training of a hypernetwork that was stopped goes on, to the same bits."""

from __future__ import annotations

import pytest

import stableedit_cpp as se
from stableedit_cpp.editors.hypernetwork.training import Training
from support.editors import assert_same_bits, state_of
from support.hypernetworks import TRAINING, fields_of, make_hyper
from support.tiny import tiny_model


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"epochs": 2, "horizon": 2, "past_sample": 3}, id="rledit"),
        pytest.param({"config": se.RLEditConfig.published, "turn_size": 5, "epochs": 2}, id="published"),
        pytest.param({"editor": se.MALMEN, "config": se.MALMENConfig, "epochs": 2}, id="malmen"),
    ],
)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_goes_on_as_if_it_had_not_been_stopped(settings, stop, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("stableedit_cpp.editors.hypernetwork.training_file._SECONDS", 0.0)
    steady, broken, fresh = (make_hyper(tokenizer, **settings) for _ in range(3))
    wanted = steady.train(TRAINING, progress=False)
    turn, calls = Training._turn, []

    def stopped(training, past):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        turn(training, past)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_turn", stopped)
        broken.train(TRAINING, checkpoint=tmp_path / "unfinished", progress=False)
        pytest.fail("there were no more turns")
    assert not any(field.any() for field in (fields_of(broken)["up"], fields_of(broken)["bias"]))
    report = fresh.train(TRAINING, checkpoint=tmp_path / "unfinished", progress=False)
    assert report.losses == wanted.losses and report.steps == wanted.steps
    assert_same_bits(fields_of(fresh), fields_of(steady))
    assert_same_bits(state_of(fresh), state_of(steady))
    again = make_hyper(tokenizer, **settings).train  # of what is finished nothing is left to do
    assert again(TRAINING, checkpoint=tmp_path / "unfinished", progress=False).losses == wanted.losses


def test_a_file_of_another_training_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("stableedit_cpp.editors.hypernetwork.training_file._SECONDS", 0.0)
    make_hyper(tokenizer).train(TRAINING, checkpoint=tmp_path / "file", progress=False)
    with pytest.raises(ValueError, match="of a training on other requests, or with another config"):
        make_hyper(tokenizer).train(TRAINING[1:], checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="of a training on other requests, or with another config"):
        make_hyper(tokenizer, clip=0.5).train(TRAINING, checkpoint=tmp_path / "file")
    with pytest.raises(ValueError, match="weights of the model outside"):
        make_hyper(tokenizer, tiny_model("llama", seed=1)).train(TRAINING, checkpoint=tmp_path / "file")
