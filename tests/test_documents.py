"""Every code block of the README and the guides runs, in order, as its reader would run it.

A page is one directory and one Python namespace. Python blocks run with every change, on a tiny model that stands where
SmolLM2 would; shell and C++ blocks run in the second layer, on SmolLM2 itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import stableedit_cpp as se
from stableedit_cpp.files.environment import cmake_prefix
from support.chats import chat_tokenizer
from support.tiny import FACTS, save_tiny

REPOSITORY = Path(__file__).parent.parent
DATA = REPOSITORY.parent / "shared/data"
GUIDES = [
    "lifelong",
    "studio",
    "closed-loop",
    "models",
    "datasets",
    "export",
    "serving",
    "side-effects",
    "cpp",
    "rivals",
    "hypernetworks",
    "scale",
]
PAGES = ["README.md", "docs/index.md", *(f"docs/{name}.md" for name in GUIDES)]
# What only sets a machine up: the environment of the tests is the result.
INSTALLING = re.compile(r"^(sudo |pip |make |\. )")


def blocks(page: str) -> list[tuple[str, str, int]]:
    """(language, code, line) of a page; the language of an indented block is "indented"."""
    tokens = MarkdownIt().parse((REPOSITORY / page).read_text(encoding="utf-8"))
    found = []
    for token in tokens:
        if token.type == "fence":
            found.append((token.info.strip(), token.content, token.map[0] + 1))
        elif token.type == "code_block":
            found.append(("indented", token.content, token.map[0] + 1))
    return found


def of_language(page: str, language: str) -> list[tuple[str, int]]:
    return [(code, line) for found, code, line in blocks(page) if found == language]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_languages_that_are_run(page):
    """What does not run is called text; an indented block holds commands that set a machine up."""
    for language, code, line in blocks(page):
        where = f"{page}, line {line}"
        assert language in ("python", "sh", "cpp", "cmake", "json", "yaml", "text", "indented"), where
        if language == "indented":
            for command in code.splitlines():
                assert not command.strip() or INSTALLING.match(command), f"{where}: {command!r} is never run"
        if language == "json":
            json.loads(code)
        if language == "yaml":
            yaml.safe_load(code)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory with the files that the pages speak of."""
    requests = [{**fact, "locality_prompt": "The sky is", "locality_target": "blue"} for fact in FACTS]
    for name in ("edits.json", "training.json", "zsre_edit_5k.json", "ultraeditbench_2m.json"):
        (tmp_path / name).write_text(json.dumps(requests))
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    (tmp_path / "mine.json").write_text(json.dumps([{"question": f["prompt"], "answer": f["target"]} for f in FACTS]))
    fever = {"equiv_prompt": ["r"], "unrel_prompt": "l", "unrel_ans": "SUPPORTS"}
    (tmp_path / "fever.json").write_text(json.dumps([{"prompt": f["prompt"], "alt": "x", **fever} for f in FACTS]))
    (tmp_path / "wiki.txt").write_text(
        "".join(f"In {year} a town had {3 * year} people.\n" for year in range(1800, 2000))
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if of_language(page, "python")])
def test_python_blocks(page, desk, monkeypatch):
    directory = save_tiny(desk / "cache/stableedit/SmolLM2-135M-Instruct", bos=True)
    chat_tokenizer("mistral").save_pretrained(directory)  # the same, and a chat template
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))  # a token a byte
    monkeypatch.setenv("XDG_CACHE_HOME", str(desk / "cache"))
    model, tokenizer = se.load_model("smollm2-135m")
    requests = se.read_requests("edits.jsonl")
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig(turn_size=4))
    editor.edit(requests, progress=False)
    model, tokenizer = se.load_model("smollm2-135m")
    namespace = {
        **{"se": se, "model": model, "tokenizer": tokenizer, "requests": requests, "editor": editor},
        **{"training": requests, "prompts": ["The sky is", "Two and two are"]},
    }
    shell(page, desk, only=r"cat > ")  # files that a page writes first
    for code, line in of_language(page, "python"):
        exec(compile("\n" * line + code, str(REPOSITORY / page), "exec"), namespace)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not there")
@pytest.mark.parametrize("page", [page for page in PAGES if of_language(page, "sh")])
def test_shell_blocks(page, desk):
    (desk / "data").symlink_to(DATA)
    for path in [DATA / "known_1000.json", *(DATA / "downstream").iterdir(), DATA / "zsre/zsre_edit_5k.json"]:
        (desk / path.name).unlink(missing_ok=True)
        (desk / path.name).symlink_to(path)
    (desk / "cpp").symlink_to(REPOSITORY / "cpp")
    (desk / "LICENSE").symlink_to(REPOSITORY / "LICENSE")
    shell(page, desk)


def shell(page: str, desk: Path, only: str | None = None) -> None:
    """Run the shell blocks of a page as one script that stops at the first failure.

    Args:
        only: pattern of the commands to run, here documents with them; None runs all.
    """
    script = "\n".join(code for code, _ in of_language(page, "sh"))
    if only is not None:
        script = "\n".join(re.findall(rf"^{only}.*?^END$", script, re.MULTILINE | re.DOTALL))
    script = "\n".join(line for line in script.splitlines() if not INSTALLING.match(line))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=desk, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
@pytest.mark.parametrize("page", [page for page in PAGES if of_language(page, "cpp")])
def test_cpp_blocks_compile(page, tmp_path):
    lines = ["#include <stableedit/stableedit.hpp>", "struct Linear { at::Tensor weight; };"]
    for number, (code, _) in enumerate(of_language(page, "cpp")):
        given = "Linear* down, Linear* down_proj, at::Tensor keys, at::Tensor value_gradients, int64_t key_dim"
        body = "\n".join(line for line in code.splitlines() if not line.startswith("#include"))
        lines.append(f"void block_{number}({given}, int64_t value_dim) {{\n{body}\n}}")
    (tmp_path / "blocks.cpp").write_text("\n".join(lines))
    torch_include = Path(torch.__file__).parent / "include"
    includes = [cmake_prefix() / "include", torch_include, torch_include / "torch/csrc/api/include"]
    flags = [flag for include in includes for flag in ("-isystem", str(include))]
    done = subprocess.run(
        ["c++", "-std=c++20", "-fsyntax-only", *flags, "blocks.cpp"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_cmake_blocks_are_those_of_the_consumer():
    """Which is built and run from the installed tree by a test of its own."""
    consumer = (REPOSITORY / "cpp/examples/consumer/CMakeLists.txt").read_text(encoding="utf-8")
    for page in PAGES:
        for code, line in of_language(page, "cmake"):
            for call in re.findall(r"(\w+)\((\w+)?", code):
                assert call[0] in consumer, f"{page}, line {line}: {call[0]}"
