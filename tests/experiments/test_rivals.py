"""Editors that decide on something when they are made, and those that edit other layers, in one matrix."""

from __future__ import annotations

import pytest

import stableedit_cpp as se
from stableedit_cpp.experiments import run_matrix
from support.streams import MODULES, load, matrix, write_data
from support.tiny import tiny_model, tiny_tokenizer


def test_all_kinds_of_editors_share_a_stream_and_are_known_again(tmp_path):
    data = write_data(tmp_path / "data")
    (tmp_path / "text.txt").write_text("".join(f"In {year} a town had {3 * year} people.\n" for year in range(40)))
    network = se.RLEdit(
        tiny_model("llama"),
        tiny_tokenizer(),
        se.RLEditConfig(edit_modules=MODULES, rank=4, end_of_answer=True),
        guard=None,
    )
    network.warm_up(network_stream(), progress=False)
    network.save_hypernetwork(tmp_path / "network.safetensors")

    low = {"edit_modules": ["model.layers.{0,1}.mlp.down_proj"], "target_steps": 3}
    low |= {"text_statistics": str(tmp_path / "statistics.safetensors"), "texts": [str(tmp_path / "text.txt")]}
    editors = [
        {"name": "fine-tune", "edit_modules": MODULES, "epochs": 2, "search": {"step_size": [1e-3, 1e-2]}},
        {"name": "lora", "edit_modules": MODULES, "epochs": 2, "after": ["prune"]},
        {"name": "memit", **low, "search": {"text_weight": [10.0, 100.0]}},
        {"name": "alphaedit", **low},
        {"name": "rledit", "search": {"hypernetwork": [str(tmp_path / "network.safetensors")]}},
    ]
    options = {"turn_size": 10, "chat_template": False, "end_of_answer": True}
    how = {"editors": editors, "editor_options": options, "warm_up": "none", "edits": 20, "search": {"edits": 10}}
    how |= {"checkpoints": 1, "metrics": ["accuracy", "locality"], "geometry": 0}
    first = run_matrix(matrix(data, **how).runs(), tmp_path / "out", load, progress=False)
    assert [document["status"] for document in first] == ["done"] * 5
    # The rows of one data set share what was measured of the unedited model; all have changed theirs.
    unedited = [document["checkpoints"][0]["scores"] for document in first]
    assert unedited == unedited[:1] * 5
    assert all(document["checkpoints"][-1]["scores"]["locality_kl"]["mean"] > 0 for document in first)
    assert first[1]["checkpoints"][-1]["after"] == "prune"
    assert first[4]["settings"]["config"]["hypernetwork"] == str(tmp_path / "network.safetensors")
    assert all(document["cost"]["turn_extra_bytes"] is not None for document in first)

    def not_again(_name):
        raise AssertionError("nothing is left to do")

    assert run_matrix(matrix(data, **how).runs(), tmp_path / "out", not_again) == first


def network_stream() -> list[dict[str, str]]:
    return [{"prompt": f"{number}. other", "target": "ab"} for number in range(12)]


def test_rows_of_a_search_need_a_value(tmp_path):
    data = write_data(tmp_path / "data")
    with pytest.raises(ValueError, match="search of step_size must be a list of values"):
        matrix(data, editors=[{"name": "fine-tune", "search": {"step_size": []}}]).runs()
