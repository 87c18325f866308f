"""Journals of version 0.1, whose records describe whiteners by other fields of the state."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.lifelong.journal.snapshots import is_state, state_digests, state_fingerprints
from support.sessions import config_of, create, stream


@pytest.fixture
def state(tmp_path, tokenizer):
    """Of an editor after three turns, with a whitener."""
    with create(tmp_path / "s", tokenizer, config=config_of(refresh=0.5)) as session:
        session.edit(stream(9))
        return session.editor.state_dict()


def group_of(state) -> str:
    (group,) = [name for name in state if name.startswith("normalizer/")]
    assert "whitener.mean_square" in state[group]
    return group


def test_their_states_are_compared_without_the_whiteners(state):
    group = group_of(state)
    earlier = state[group] | {"whitener_energy": torch.tensor(0.9), "sample": torch.ones(2, 3)}
    earlier |= {"decompositions": torch.tensor(1), "whitener.root": torch.ones(1, 1)}
    del earlier["whitener.mean_square"]
    recorded = state_digests({**state, group: earlier})
    assert is_state(state, recorded)

    mean = {"tracker.mean": state[group]["tracker.mean"] + 1}
    assert not is_state({**state, group: state[group] | mean}, recorded)
    name, weight = next(iter(state["weights"].items()))
    assert not is_state({**state, "weights": state["weights"] | {name: weight + 1}}, recorded)


def test_states_of_this_version_are_compared_as_a_whole(state):
    group = group_of(state)
    recorded = state_fingerprints(state)
    assert is_state(state, recorded)
    assert not is_state({**state, group: state[group] | {"decompositions": torch.tensor(99)}}, recorded)
