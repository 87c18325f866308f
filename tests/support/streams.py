"""Tiny streams of edits in the format of ZsRE, and runs on them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stableedit_cpp.experiments import Matrix, StreamRun, run_matrix
from support.tiny import tiny_model, tiny_tokenizer

MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
OPTIONS = {"edit_modules": MODULES, "turn_size": 10, "step_size": 1e-2}


def record(index: int) -> dict[str, str]:
    words = ["ab", "ba", "cd", "dc", "x", "yz"]
    return {
        "src": f"{index}. first",
        "ans": words[index % 6],
        "rephrase": f"{index}. say",
        "loc": f"{index} other",
        "loc_ans": words[index // 6 % 6],
        "subject": str(index),
    }


def write_data(directory: Path, edits: int = 60, warm_up: int = 40) -> Path:
    """``directory/zsre`` as a data set by name."""
    (directory / "zsre").mkdir(parents=True, exist_ok=True)
    for name, begin, end in (("edit", 0, edits), ("train", 1000, 1000 + warm_up)):
        records = [record(index) for index in range(begin, end)]
        (directory / "zsre" / f"zsre_{name}.json").write_text(json.dumps(records))
    return directory


def matrix(data: Path, **changes) -> Matrix:
    settings = {
        "editors": ["one-pass"],
        "datasets": ["zsre"],
        "models": ["tiny"],
        "data": str(data),
        "edits": 40,
        "warm_up_size": 20,
    }
    # Few answers of a random model ever become right; its divergence from the unedited one shows what an edit did.
    settings |= {"editor_options": OPTIONS, "checkpoints": 2, "metrics": ["accuracy", "locality"]}
    return Matrix(**(settings | changes))


def load(_name: str):
    return tiny_model("llama"), tiny_tokenizer()


def bench(data: Path, output: Path, *, how: dict | None = None, **changes) -> list[dict]:
    return run_matrix(matrix(data, **changes).runs(), output, load, progress=False, **(how or {}))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Killed(BaseException):
    """Stands for a kill: nothing is tidied up."""


@contextlib.contextmanager
def killed_after(turns: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within this a run ends after so many turns, before it writes the last of them down."""
    turn = StreamRun._turn

    def killed(run, kind, requests):
        result = turn(run, kind, requests)
        if run._cost.turns == turns:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StreamRun, "_turn", killed)
        yield
