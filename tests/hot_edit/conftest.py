"""A tiny model for the server, exported once, patches of it, and the server itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stableedit_cpp import core
from support.hot_edit import BUILD, EXAMPLE, MODULES, ROOT, Server, export_model
from support.processes import one_process_at_a_time
from support.tiny import save_tiny


@pytest.fixture(scope="module")
def cached_export(request) -> Callable[[str, str], Path]:
    """Exports a model (name, what to load) and keeps it between runs: compiling takes half a minute, or minutes."""
    sources = [EXAMPLE / "export_model.py", ROOT / "tests/support/tiny.py"]
    key = hashlib.sha256(torch.__version__.encode() + b"".join(source.read_bytes() for source in sources)).hexdigest()

    def cached(name: str, source: str) -> Path:
        directory = Path(request.config.cache.mkdir("hot_edit_server")) / f"{name}-{key[:16]}"
        with one_process_at_a_time(directory):
            if not directory.exists():
                assert export_model.main(["--model", source, "--output", str(directory), "--max-length", "64"]) == 0
        return directory

    return cached


@pytest.fixture(scope="module")
def exported(cached_export, tmp_path_factory) -> Path:
    source = save_tiny(tmp_path_factory.mktemp("tiny"))
    return cached_export("tiny", str(source))


@pytest.fixture(scope="module")
def digest(exported) -> str:
    return json.loads((exported / "manifest.json").read_text())["model_digest"]


@pytest.fixture(scope="module")
def patches(tmp_path_factory, digest) -> Path:
    """Files a, b and c: low-rank changes, one of them dense, that overlap in their modules."""
    directory = tmp_path_factory.mktemp("patches")
    generator = torch.Generator().manual_seed(0)

    def low_rank(scale: float) -> core.WeightChange:
        left, right = torch.randn(16, 2, generator=generator), torch.randn(2, 24, generator=generator)
        return core.WeightChange(core.LowRankUpdate(scale * left, right))

    dense = core.WeightChange(0.5 * torch.randn(16, 24, generator=generator))
    changes = {
        "a": {MODULES[0]: low_rank(1.0), MODULES[2]: low_rank(1.0)},
        "b": {MODULES[1]: low_rank(1.0), MODULES[2]: dense},
        "c": {MODULES[2]: low_rank(2.0)},
    }
    for name, modules in changes.items():
        patch = core.Patch(modules, id=name, base_model="tiny", base_digest=digest, requests='{"edits": 1}')
        core.save_patch(directory / f"{name}.safetensors", patch)
    return directory


@pytest.fixture
def options(exported, patches, tmp_path) -> dict:
    return {"model": exported, "patches": patches, "state": tmp_path / "state"}


@pytest.fixture
def server(options):
    with Server(BUILD / "hot_edit_server", **options) as running:
        yield running
