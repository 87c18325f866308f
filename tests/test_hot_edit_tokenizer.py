"""The tokenizer of cpp/examples/hot_edit_server against the Python one."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableedit_cpp import load_model

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("STABLEEDIT_BUILD_DIR", ROOT / "build/editable")) / "cpp/examples/hot_edit_server"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUILD / "hot_edit_tokenize").exists(),
        reason=f"no hot_edit_tokenize in {BUILD}; `make test-cpp` builds it where its libraries are installed",
    ),
]


def tokenized(file: Path, texts: list[str]) -> list[dict]:
    """ids and text of the C++ tokenizer."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    done = subprocess.run([BUILD / "hot_edit_tokenize", file], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


@pytest.fixture(scope="module")
def smollm2_tokenizer(tmp_path_factory):
    tokenizer = load_model("smollm2-135m")[1]
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(file))
    return tokenizer, file


def check_tokenizer(smollm2_tokenizer, texts: list[str]) -> None:
    tokenizer, file = smollm2_tokenizer
    for text, found in zip(texts, tokenized(file, texts), strict=True):
        ids = tokenizer(text)["input_ids"]
        assert found == {"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True)}, repr(text)


def test_the_tokenizer_on_real_prompts(smollm2_tokenizer):
    world = ROOT / "python/stableedit_cpp/data/world_2025.json"
    files = [world, *(ROOT.parent / "shared/data").glob("*/zsre_edit_5k.json")]
    texts: list[str] = []
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        records = data["facts"] if file == world else data[:1000]
        texts += [text for record in records for text in record.values() if isinstance(text, str)]
    check_tokenizer(smollm2_tokenizer, texts)


# Up to U+1FFFF: PCRE2 and the Python tokenizer know different versions of Unicode, and differ on letters that were
# added between them.
_TEXT = st.text(st.characters(codec="utf-8", max_codepoint=0x1FFFF, exclude_categories=["Cn"]), max_size=40)
_PIECES = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "'s", " 12", "\n\n ", "  ", "\t", "don't", "Å", "é", "日本", ""]
)


@settings(max_examples=5, deadline=None)
@given(st.lists(st.lists(_TEXT | _PIECES, max_size=6).map("".join), min_size=40, max_size=40))
def test_the_tokenizer_on_any_text(smollm2_tokenizer, texts):
    check_tokenizer(smollm2_tokenizer, texts)
