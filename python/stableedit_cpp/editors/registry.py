"""Editors by name: what config files, the command line, ``stableedit bench`` and the documentation call them.

A new editor is one file: config, solver, an ``Editor`` of these two classes, and ``register_editor`` at the end.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import torch

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.modules import EditModule

__all__ = [
    "CLASSES",
    "EDITORS",
    "NamedEditor",
    "load_config",
    "load_editor",
    "load_plugins",
    "make_editor",
    "modules_of",
    "named_editor",
    "parse_config",
    "register_editor",
]


@dataclass(frozen=True)
class NamedEditor:
    """An editor with its settings, as an experiment has it and ``--preset`` gives it.

    Attributes:
        name: what tables and options call it.
        config: of the editor.
        warm_up: whether it is warmed up at all.
        summary: what it is, or how it differs from the editor's default.
        ablation: whether it is the editor with one part left out, for ``stableedit bench ablations``.
    """

    name: str
    config: EditorConfig
    warm_up: bool = True
    summary: str = ""
    ablation: bool = False


CLASSES: dict[str, type[Editor]] = {}  # by the name that the config class has
EDITORS: dict[str, NamedEditor] = {}  # all settings of all of them, by their own names


def register_editor(cls: type[Editor], *settings: NamedEditor) -> None:
    """Make an editor known by name: its configs can be read from then on, its settings chosen.

    Args:
        cls: with a ``config_class`` whose ``editor`` is the name.
        settings: the default first, called like the editor. None take the config's defaults under that name.

    Raises:
        ValueError: for a name that another editor has, or settings that are not of this editor's config class.
    """
    name = cls.config_class.editor
    settings = settings or (NamedEditor(name, cls.config_class()),)
    for one in settings:
        if not isinstance(one.config, cls.config_class):
            raise ValueError(f"{one.name!r} must have a {cls.config_class.__name__}, not a {type(one.config).__name__}")
        if one.name in EDITORS and EDITORS[one.name].config.editor != name:
            raise ValueError(f"{one.name!r} is taken by the editor {EDITORS[one.name].config.editor!r}")
    if name in CLASSES and CLASSES[name].__qualname__ != cls.__qualname__:
        raise ValueError(f"the name {name!r} is taken by {CLASSES[name].__qualname__}")
    CLASSES[name] = cls
    EDITORS.update((one.name, one) for one in settings)


@cache
def load_plugins() -> None:
    """Import the editors of other packages: modules under the entry points ``stableedit.editors``, which register them.

    One that fails is left out with a warning. Every look-up below does this first.
    """
    for point in entry_points(group="stableedit.editors"):
        try:
            point.load()
        except Exception as error:
            warnings.warn(f"the editor {point.name!r} ({point.value}) cannot be loaded: {error}", stacklevel=2)


def make_editor(model: torch.nn.Module, tokenizer, config: EditorConfig) -> Editor:
    """The editor that ``config`` belongs to."""
    return _class(config.editor)(model, tokenizer, config)


def modules_of(model: torch.nn.Module, config: EditorConfig) -> list[EditModule]:
    """The modules that the editor of this config edits; see ``Editor.modules_of``."""
    return _class(config.editor).modules_of(model, config)


def load_editor(model: torch.nn.Module, tokenizer, path: str | Path) -> Editor:
    """The editor of whatever class that ``Editor.save`` wrote; see ``Editor.load``."""
    saved = SavedEditor.read(path)
    return _class(parse_config(saved.config).editor).load(model, tokenizer, saved)


def parse_config(text: str) -> EditorConfig:
    """Read the JSON of a config of any editor; raises as ``from_json``, and for an unknown editor."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        document = None  # from_json says what is wrong
    editor = document.get("editor", "stableedit") if isinstance(document, dict) else "stableedit"
    return _class(editor).config_class.from_json(text)


def load_config(path: str | Path) -> EditorConfig:
    """Read a config file of any editor.

    Raises:
        OSError: if the file cannot be read.
        ValueError: with the path, as ``parse_config``.
    """
    try:
        return parse_config(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def named_editor(name: str, changes: Mapping[str, object] | None = None) -> NamedEditor:
    """Look an editor with its settings up.

    Args:
        name: one of ``EDITORS``, or a JSON config file, which is called by the file's name without suffix.
        changes: fields of its config to set differently.

    Raises:
        ValueError: for an unknown name (with the list, and the nearest), a field that the config does not have, or a
            bad value. OSError: for a config file that cannot be read.
    """
    load_plugins()
    if Path(name).suffix == ".json":
        config = load_config(name)
        warm_up = config.warms_up and config.step_size != "auto"  # which depends on no earlier turn
        found = NamedEditor(Path(name).stem, config, warm_up, f"config {name}")
    elif name in EDITORS or name.replace("_", "-") in EDITORS:
        found = EDITORS[name if name in EDITORS else name.replace("_", "-")]
    else:
        raise ValueError(f"unknown editor {with_nearest(name, EDITORS)}; or a JSON config file")
    changes = dict(changes or {})
    fields = {field.name: field for field in dataclasses.fields(found.config)}
    for field, value in changes.items():
        if field not in fields:
            raise ValueError(f"editor {found.name}: unknown field of its config {with_nearest(field, fields)}")
        if isinstance(value, str) and str(fields[field].type).startswith(
            "float"
        ):  # YAML takes 3e-4 for text: it wants 3.0e-4
            try:
                changes[field] = float(value)
            except ValueError:
                continue  # the config says what is wrong
    # What follows from another field shall follow from its new value.
    if "whitening" in changes and "warm_up_whitening" in fields and "warm_up_whitening" not in changes:
        changes["warm_up_whitening"] = None
    try:
        config = dataclasses.replace(found.config, **changes)
    except ValueError as error:
        raise ValueError(f"editor {found.name}: {error}") from None
    return dataclasses.replace(found, config=config)


def _class(editor: object) -> type[Editor]:
    load_plugins()
    if not isinstance(editor, str) or editor not in CLASSES:
        raise ValueError(f"unknown editor {with_nearest(editor, CLASSES)}")
    return CLASSES[editor]
