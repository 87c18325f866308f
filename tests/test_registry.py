"""Editors by name: one registry for classes, settings, command line and documentation; an editor keeps its config."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors import make_editor, named_editor, parse_config, registry
from support.editors import MODULES
from support.tiny import tiny_model


class TestTheConfigOfAnEditor:
    @pytest.mark.parametrize(
        ("editor", "config", "words"),
        [
            (se.StableEdit, se.UltraEditConfig(), "must be a StableEditConfig for StableEdit, not a UltraEditConfig"),
            (se.UltraEdit, se.StableEditConfig(), "must be a UltraEditConfig for UltraEdit, not a StableEditConfig"),
            (se.StableEdit, {"ridge": 1.0}, "must be a StableEditConfig for StableEdit, not a dict"),
        ],
    )
    def test_is_of_its_own_class(self, editor, config, words, tokenizer):
        with pytest.raises(ValueError, match=words):
            editor(tiny_model("llama"), tokenizer, config)

    @pytest.mark.parametrize("editor", [se.StableEdit, se.UltraEdit])
    def test_is_that_of_the_defaults_when_none_is_given(self, editor, tokenizer):
        config = editor(tiny_model("llama"), tokenizer).config
        default = editor.config_class()
        found = {"edit_modules": config.edit_modules, "chat_template": False}  # the tokenizer has no template
        assert config == dataclasses.replace(default, **found)

    def test_names_its_modules_and_stays(self, tokenizer):
        config = se.StableEditConfig(edit_modules=["*.{0,2}.mlp.down_proj"])
        editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
        found = {"edit_modules": [MODULES[0], MODULES[2]], "chat_template": False}
        assert editor.config == dataclasses.replace(config, **found)
        with pytest.raises(AttributeError):
            editor.config = config


# A new editor as a stranger writes it: one file with a config, a class and one call.
STRANGER = """
from dataclasses import dataclass
from typing import ClassVar

import stableedit_cpp as se
from stableedit_cpp.core import LifelongNormalizer, WhiteningOptions
from stableedit_cpp.editors.solver import Solver


@dataclass(frozen=True, kw_only=True)
class PlainConfig(se.EditorConfig):
    editor: ClassVar[str] = "plain"
    ridge: float = 3.0


class PlainSolver(Solver):
    def _make_normalizer(self, key_dim, value_dim):
        return LifelongNormalizer(key_dim, value_dim, whitening=WhiteningOptions(mode="none"))


class Plain(se.Editor):
    config_class = PlainConfig
    solver_class = PlainSolver


se.register_editor(Plain, se.NamedEditor("plain", PlainConfig(), False, "no normalization at all"))
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package in the environment whose entry point names an editor."""
    (tmp_path / "plain_editor.py").write_text(STRANGER)
    info = tmp_path / "plain_editor-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-editor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stableedit.editors]\nplain = plain_editor\nbroken = no_such_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(registry.CLASSES), dict(registry.EDITORS)
    registry.load_plugins.cache_clear()
    yield
    sys.modules.pop("plain_editor", None)
    for names, before in zip((registry.CLASSES, registry.EDITORS), known, strict=True):
        names.clear()
        names.update(before)
    registry.load_plugins.cache_clear()


class TestTheRegistry:
    def test_every_name_is_settings_of_a_known_editor(self):
        assert {"stableedit", "ultraedit", "rledit", "malmen", "fine-tune", "lora"} <= set(registry.CLASSES)
        for name, editor in se.EDITORS.items():
            assert editor.name == name and editor.summary
            assert type(editor.config) is registry.CLASSES[editor.config.editor].config_class
        for name, cls in registry.CLASSES.items():
            assert se.EDITORS[name].config == cls.config_class()
        for name in ("stableedit", "ultraedit", "rledit", "malmen"):
            published = se.EDITORS[f"{name}-published"].config
            assert published == registry.CLASSES[name].config_class.published(step_size=published.step_size)
        assert se.EDITORS["closed-loop"].config == se.StableEditConfig.closed_loop()

    def test_an_ablation_differs_from_one_pass_in_one_part(self):
        default = dataclasses.asdict(se.EDITORS["one-pass"].config)
        changed = {}
        for editor in se.EDITORS.values():
            if editor.ablation:
                own = dataclasses.asdict(editor.config)
                changed[editor.name] = {field for field in own if own[field] != default[field]}
                if not editor.warm_up:
                    changed[editor.name].add("the warm-up")
        assert changed == {
            "no-ln": {"whitening", "warm_up_whitening"},
            "no-warm-up": {"the warm-up"},
            "diagonal": {"whitening"},
            "per-module": {"statistics"},
            "absolute-floor": {"floor", "floor_mode"},
            "frozen-statistics": {"frozen_statistics"},
        }

    def test_the_documentation_has_every_name_and_summary(self):
        text = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text()
        missing = [e.name for e in se.EDITORS.values() if f"| `{e.name}` | {e.summary} |" not in text]
        assert not missing

    def test_names_are_not_taken_twice(self):
        class Other(se.Editor):
            config_class = se.StableEditConfig

        with pytest.raises(ValueError, match="the name 'stableedit' is taken by StableEdit"):
            se.register_editor(Other)
        with pytest.raises(ValueError, match="'closed-loop' is taken by the editor 'stableedit'"):
            se.register_editor(se.UltraEdit, se.NamedEditor("closed-loop", se.UltraEditConfig()))
        with pytest.raises(ValueError, match="'mine' must have a StableEditConfig, not a UltraEditConfig"):
            se.register_editor(se.StableEdit, se.NamedEditor("mine", se.UltraEditConfig()))


class TestAStrangersEditor:
    def test_is_found_by_configs_command_line_and_bench(self, stranger, tokenizer, capsys):
        with pytest.warns(
            UserWarning, match="the editor 'broken' .* cannot be loaded: No module named 'no_such_module'"
        ):
            config = parse_config('{"editor": "plain", "edit_modules": ["*.down_proj"]}')
        assert (type(config).__name__, config.ridge) == ("PlainConfig", 3.0)
        assert parse_config(config.to_json()) == config
        assert named_editor("plain", {"ridge": 5.0}).config.ridge == 5.0
        editor = make_editor(tiny_model("llama"), tokenizer, config)
        before = editor.model.get_submodule(MODULES[0]).weight.clone()
        editor.edit([{"prompt": "Gold is", "target": "blue"}])
        assert not torch.equal(editor.model.get_submodule(MODULES[0]).weight, before)
        capsys.readouterr()
        assert main(["editors"]) == 0
        assert "no normalization at all" in capsys.readouterr().out
