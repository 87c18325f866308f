"""What `import stableedit_cpp` promises: the torch it was built for, and the names and signatures of the contract."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp import _build_info
from stableedit_cpp._torch_check import check_torch

REPAIR = [
    "pip install --force-reinstall --no-deps --no-cache-dir --no-binary stableedit-cpp stableedit-cpp",
    "pip install --force-reinstall --no-deps .",
]


@pytest.mark.parametrize("built", ["1.13.1", "2.0.0", "3.13.0", "2.130.0", "2.1.3+cu121"])
def test_another_minor_version_of_torch_is_refused(monkeypatch, built):
    monkeypatch.setattr(_build_info, "torch_version", built)
    with pytest.raises(ImportError) as error:
        check_torch()
    message = str(error.value)
    assert f"built against torch {built}, but torch {torch.__version__} is installed" in message
    for command in REPAIR:
        assert command in message


@pytest.mark.parametrize("suffix", [".0", ".99", ".0+cu130", ".0a0+gitabc"])
def test_another_patch_or_flavour_of_torch_is_fine(monkeypatch, suffix):
    minor = ".".join(torch.__version__.split(".")[:2])
    monkeypatch.setattr(_build_info, "torch_version", minor + suffix)
    check_torch()


@pytest.mark.parametrize("program", ["script.py", "/usr/bin/stableedit", "-m"])
def test_import_checks_torch(program, monkeypatch, capsys):
    """The first import of a process, in this one: as if only the build's facts were known yet."""
    loaded = [name for name in sys.modules if name.partition(".")[0] == "stableedit_cpp"]
    for name in set(loaded) - {_build_info.__name__}:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(_build_info, "torch_version", "1.0.0")
    with pytest.raises((ImportError, SystemExit)) as caught:
        importlib.import_module("stableedit_cpp")
    printed = capsys.readouterr().err
    if program == "script.py":
        assert (caught.type, printed) == (ImportError, "")
        message = str(caught.value)
    else:  # a line for a person, and no traceback
        assert (caught.type, caught.value.code) == (SystemExit, 2)
        message = printed.removeprefix("stableedit: error: ")
    assert message.startswith("stableedit_cpp ")
    assert "was built against torch 1.0.0" in message
    assert REPAIR[1] in message


def test_version():
    assert se.__version__ == importlib.metadata.version("stableedit-cpp") == _build_info.version
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{se.__version__}"' in pyproject.read_text(encoding="utf-8")


def test_public_names_exist():
    for module in (se, se.core):
        assert sorted(module.__all__) == sorted(set(module.__all__))
        for name in module.__all__:
            assert getattr(module, name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "StableEdit",
        "StableEditConfig",
        "UltraEdit",
        "UltraEditConfig",
        "EditRequest",
        "evaluate",
        "read_requests",
        "load_model",
        "core",
    ],
)
def test_names_of_the_contract(name):
    assert name in se.__all__


@pytest.mark.parametrize(
    "name",
    [
        "RunningMoments",
        "NormalInverseWishart",
        "Whitener",
        "WhiteningOptions",
        "solve_ridge",
        "LowRankUpdate",
        "LifelongNormalizer",
        "ModuleEditor",
        "MasterWeight",
    ],
)
def test_core_names_of_the_contract(name):
    assert name in se.core.__all__
    assert getattr(se.core, name).__doc__


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_signatures_of_the_contract():
    assert parameters(se.EditRequest)[:7] == [
        "prompt",
        "target",
        "rephrase",
        "locality_prompt",
        "locality_target",
        "subject",
        "id",
    ]
    optional = list(inspect.signature(se.EditRequest).parameters.values())[2:]
    assert all(parameter.default is None for parameter in optional)
    for editor in (se.StableEdit, se.UltraEdit):
        assert parameters(editor) == ["model", "tokenizer", "config", "guard", "distributed"]
        assert inspect.signature(editor).parameters["guard"].kind == inspect.Parameter.KEYWORD_ONLY
        assert issubclass(editor, se.Editor)
        for method in (editor.warm_up, editor.edit):
            assert parameters(method)[:2] == ["self", "requests"]
            assert all(p.kind == p.KEYWORD_ONLY for p in list(inspect.signature(method).parameters.values())[2:])
    assert parameters(se.evaluate)[:3] == ["model", "tokenizer", "requests"]
    contract = ["edit_modules", "step_size", "ridge", "statistics", "turn_size", "micro_batch", "max_passes"]
    for config in (se.StableEditConfig, se.UltraEditConfig):
        assert set(contract) <= set(parameters(config))
        assert {"edit_modules", "step_size"} <= set(parameters(config.published))
        assert issubclass(config, se.EditorConfig)
    assert {"whitening", "floor", "floor_mode"} <= set(parameters(se.StableEditConfig))
    assert {"efficacy", "generalization", "specificity", "per_request"} <= set(se.Scores.__dataclass_fields__)


def test_the_example_of_the_contract():
    config = se.StableEditConfig(
        edit_modules=["model.layers.22.mlp.down_proj"],
        step_size=3e-4,
        ridge=10.0,
        whitening="full",
        floor=0.1,
        floor_mode="relative",
        statistics="shared",
        turn_size=100,
        micro_batch=10,
        max_passes=1,
    )
    assert (config.step_size, config.ridge, config.floor) == (3e-4, 10.0, 0.1)
    assert (config.whitening, config.floor_mode, config.statistics) == ("full", "relative", "shared")


def test_public_functions_are_documented():
    for name in se.__all__:
        item = getattr(se, name)
        assert name == "__version__" or inspect.getdoc(item), name
    for name in se.core.__all__:
        assert inspect.getdoc(getattr(se.core, name)), name
