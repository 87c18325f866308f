"""The architectures of docs/models.md: each row is what trying it gives.

``pytest tests/test_model_table.py --write-model-table`` tries all of them and writes the page; a new architecture is a
line in support/architectures.py.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import transformers

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.cli.models import model_table, tried_architectures
from support.architectures import ARCHITECTURES, MULTIMODAL, build
from support.tiny import FACTS
from support.trying import try_architecture

REPOSITORY = Path(__file__).parent.parent
ROWS = REPOSITORY / "python/stableedit_cpp/cli/architectures.json"
PAGE = REPOSITORY / "docs/models.md"
MARKS = ("<!-- models -->", "<!-- end of models -->")
ALL = [*ARCHITECTURES, *MULTIMODAL]
# With every change: attention beside an MLP, recurrent layers of two kinds, experts, a wrapper.
FEW = ["Falcon", "Mamba", "Rwkv", "Mixtral", "Llava"]


def row_of(name: str) -> dict[str, object]:
    return next(row for row in tried_architectures()["architectures"] if row["architecture"] == name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in sorted(ALL, key=str.lower)]
)
def test_a_row_is_what_trying_gives(name, tokenizer, tmp_path, request):
    found = try_architecture(name, tokenizer, tmp_path)
    if request.config.getoption("--write-model-table"):
        write(found)
    assert found == row_of(name)


def write(row: dict[str, object]) -> None:
    """Put a row into the file and the page; rows of architectures that are no longer tried go."""
    known = tried_architectures()["architectures"] if ROWS.exists() else []
    rows = {one["architecture"]: one for one in known if one["architecture"] in ALL} | {row["architecture"]: row}
    ordered = sorted(rows.values(), key=lambda one: one["architecture"].lower())
    versions = {package: version(package) for package in ("transformers", "torch", "peft")}
    document = {"versions": versions, "architectures": ordered}
    ROWS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    head, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(f"{head}{MARKS[0]}\n{written(document)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def written(document: dict) -> str:
    tried = ", ".join(f"{package} {number}" for package, number in document["versions"].items())
    table, notes = model_table(document["architectures"])
    count = len(document["architectures"])
    return "\n".join([f"{count} architectures, with {tried}.", "", table.markdown(), "", *notes])


def test_the_page_has_the_rows_and_no_others():
    known = tried_architectures()
    assert [row["architecture"] for row in known["architectures"]] == sorted(ALL, key=str.lower)
    assert len(ALL) >= 40
    inside = PAGE.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    assert inside.strip() == written(known)


def test_the_command_prints_them(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ALL) + 2 + len(model_table(tried_architectures()["architectures"])[1])
    assert main(["models", "qwen3-moe", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["architectures"]
    assert row == row_of("Qwen3Moe")
    assert main(["models", "qwan3"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_rwkv_that_rescales_its_weights_is_refused(tokenizer):
    """It halves them, and does so again when what was edited and saved is loaded."""
    config = build("Rwkv").config
    config.rescale_every = 2
    model = transformers.RwkvForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"rescale_every = 2.*load it with rescale_every=0"):
        se.StableEdit(model, tokenizer)
    config.rescale_every = 0
    assert se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass()).edit(FACTS[:1], progress=False).edits == 1
