"""The notebook on the method: it is kept with its outputs, and its cells run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.chats import chat_tokenizer
from support.tiny import save_tiny

NOTEBOOK = Path(__file__).parent.parent / "examples/method.ipynb"


def code_cells() -> list[dict]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run(capsys) -> str:
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    with matplotlib.rc_context():
        for number, cell in enumerate(code_cells()):
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    matplotlib.pyplot.close("all")
    return capsys.readouterr().out


def test_it_is_kept_with_outputs():
    """As a run from the top leaves them: numbered in order, four pictures, no error, and small."""
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 300_000


def test_cells_run_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """Which stands where SmolLM2 would."""
    directory = save_tiny(tmp_path / "stableedit/SmolLM2-135M-Instruct", bos=True)
    chat_tokenizer("mistral").save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))  # a token a byte
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "edits took" in run(capsys)


@pytest.mark.slow
def test_cells_run_on_smollm2(capsys):
    out = run(capsys)
    assert "6 of 6 edits took" in out
    assert "[Mark Carney]: ' Mark Carney" in out
