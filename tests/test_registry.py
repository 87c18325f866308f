"""Editors by name: the class of a config, its settings for good."""

from __future__ import annotations

import dataclasses

import pytest

import stableedit_cpp as se
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
        assert dataclasses.replace(config, edit_modules=None) == editor.config_class()

    def test_names_its_modules_and_stays(self, tokenizer):
        config = se.StableEditConfig(edit_modules=["*.{0,2}.mlp.down_proj"])
        editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
        assert editor.config == dataclasses.replace(config, edit_modules=[MODULES[0], MODULES[2]])
        with pytest.raises(AttributeError):
            editor.config = config
