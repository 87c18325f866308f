"""What the configs of all editors share: plain dataclasses, checked when made, with a JSON round trip."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal, TypeVar

from stableedit_cpp.files.words import check_whole, with_nearest

__all__ = ["LATER_FIELDS", "PLAIN", "EditorConfig"]

_FORMAT_VERSION = 1
# Fields that earlier versions wrote, with the one value that still means something: what they did without them.
_EARLIER = {"past_key_rank": None}
# Fields that earlier versions did not have, with what those did; not all editors have all of them.
LATER_FIELDS = {"take_probability": 0.0, "past_key_weight": 0.0, "retries_feed_statistics": True, "centred": True}
LATER_FIELDS |= {"chat_template": False, "end_of_answer": False, "prompt_rows": False, "anchors": 0, "replays": 0}
LATER_FIELDS |= {"split_special_tokens": False}
# The form of version 0.1, and of released code: plain text that has no end, in which control tokens are parsed.
PLAIN = {"chat_template": False, "end_of_answer": False, "split_special_tokens": False}
_Config = TypeVar("_Config", bound="EditorConfig")


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """What every editor needs; each editor adds its own fields, and its name as ``editor``. The defaults here are those
    of one pass of a fixed step on plain text, as published; an editor may have others (``StableEditConfig``).

    Attributes:
        edit_modules: names or patterns (``*``, ``?``, ``[..]``, ``{22,24}``, ``{22..28}``) of the linear maps to edit;
            None takes the attention output projections of all layers in the last third of the model but the last; where
            the step is a number, the MLP output projections of four layers there. ``choose_modules`` measures which are
            best.
        step_size: the paper's eta, > 0; or "auto": each pass takes the step that its loss and its gradients ask for
            (``core.PolyakStep``), which suits any model, loss and choice of modules.
        ridge: weight of the norm penalty in the least-squares solution, > 0.
        statistics: "shared" pools the running statistics of modules of one shape, as the published code does;
            "per_module" keeps them apart, as the paper has it.
        turn_size: edit requests a turn, each with its variants.
        micro_batch: prompts over whose answer tokens the loss is averaged (sets the scale of the value gradients).
        max_passes: solve again, up to this often a turn, for what has not taken yet (not in a warm-up).
        prompt_rows: solve for what the prompt's tokens (all but the first) pass on, too, not only for what predicts the
            answer: more rows in the same solution. Does not pay with the long prompts of chats (docs/closed-loop.md).
        take_probability: a request has taken when every answer token is the model's top choice and has at least this
            probability, in [0, 1). A margin lasts longer than a narrow win, and costs more drift.
        anchors: at most so many unrelated prompts in each pass, whose answers are held to those of the unedited model
            (``editors/anchors.py``); 0 holds none.
        replays: at most so many statements of earlier turns in each pass, solved for again beside those of the turn
            (``editors/replays.py``); 0 replays none.
        frozen_statistics: running statistics are those of the warm-up (without one, of the first turn); no later turn
            counts in them. For experiments.
        retries_feed_statistics: whether the later passes of a turn, and repairs, count in the running statistics.
        past_key_weight: weight of the second moment C of the keys of earlier turns in the least-squares solution,
            D = (H^T H + past_key_weight C + ridge I)^(-1) H^T V, >= 0; protects what was edited before. 0 as published.
            C and its factorisation are ``2 * k * k`` numbers a module.
        chat_template: True edits chats: prompts are a user's turn, rendered by the tokenizer's chat template, and
            targets the assistant's. False edits plain texts, in which the target follows the prompt and a space. None
            edits chats where the template belongs to the model, as that of an instruct model does: it closes an answer
            with a token at which the model's generation stops. Base models stop at another, also where they come with
            the template of their instruct version. ``model.form.find_form`` has the details.
        end_of_answer: the last token of every answer is one that ends it (that of the end of the assistant's turn, or
            the end-of-sequence token), so that a request has taken when the model gives the target and then stops.
        split_special_tokens: what prompts, targets, subjects and variants spell is text, also where it is the name of a
            control token (``</s>``, ``<|im_end|>``); in chats only what the template writes is a control token. False
            lets the tokenizer find control tokens in them: for prompts that are rendered already
            (``chat_template=False``), and as published code does.
        max_tokens_per_forward: how many tokens, padding included, one forward pass may hold. Affects speed and
            memory, not results.
    """

    editor: ClassVar[str]
    warms_up: ClassVar[bool] = True  # whether a training stream first is of use, with a step that is a number

    edit_modules: list[str] | None = None
    step_size: float | Literal["auto"] = 3.5e-4
    ridge: float = 10.0
    statistics: Literal["shared", "per_module"] = "shared"
    turn_size: int = 100
    micro_batch: int = 10
    max_passes: int = 1
    prompt_rows: bool = False
    take_probability: float = 0.0
    anchors: int = 0
    replays: int = 0
    retries_feed_statistics: bool = True
    frozen_statistics: bool = False
    past_key_weight: float = 0.0
    chat_template: bool | None = False
    end_of_answer: bool = False
    split_special_tokens: bool = True
    max_tokens_per_forward: int = 2048

    def __post_init__(self) -> None:
        modules = self.edit_modules
        if modules is not None:
            modules = [modules] if isinstance(modules, str) else modules
            modules = list(modules) if isinstance(modules, Iterable) else []
            if not modules or not all(isinstance(name, str) and name for name in modules):
                raise ValueError(f"edit_modules must be a list of module names or patterns, not {self.edit_modules!r}")
            object.__setattr__(self, "edit_modules", modules)
        if isinstance(self.step_size, str) and self.step_size != "auto":
            raise ValueError(f"step_size must be a finite number, or 'auto', not {self.step_size!r}")
        if self.step_size != "auto":
            self._check_positive("step_size", self.step_size)
        self._check_positive("ridge", self.ridge)
        self._check_choice("statistics", ("shared", "per_module"))
        self._check_number("take_probability", self.take_probability)
        if not 0 <= self.take_probability < 1:
            raise ValueError(f"take_probability must be at least 0 and less than 1, not {self.take_probability!r}")
        self._check_flag("prompt_rows")
        self._check_flag("retries_feed_statistics")
        self._check_flag("frozen_statistics")
        self._check_number("past_key_weight", self.past_key_weight)
        if self.past_key_weight < 0:
            raise ValueError(f"past_key_weight must be at least 0, not {self.past_key_weight!r}")
        if self.chat_template is not None:
            self._check_flag("chat_template")
        self._check_flag("end_of_answer")
        self._check_flag("split_special_tokens")
        check_whole("anchors", self.anchors, 0)
        check_whole("replays", self.replays, 0)
        for name in ("turn_size", "micro_batch", "max_passes", "max_tokens_per_forward"):
            check_whole(name, getattr(self, name))

    def _check_number(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} must be a finite number, not {value!r}")

    def _check_positive(self, name: str, value: float) -> None:
        self._check_number(name, value)
        if value <= 0:
            raise ValueError(f"{name} must be greater than 0, not {value!r}")

    def _check_flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name} must be true or false, not {getattr(self, name)!r}")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {getattr(self, name)!r}")

    def placed(self) -> EditorConfig:
        """The same with files by their whole paths, for what is opened from other directories."""
        return self

    @property
    def form(self) -> dict[str, bool | None]:
        """What of it decides on the form of prompts and answers, as ``model.form.find_form`` takes it."""
        return {name: getattr(self, name) for name in ("chat_template", "end_of_answer", "split_special_tokens")}

    @property
    def asked(self) -> dict[str, bool | None]:
        """How ``evaluate`` and ``generate`` ask in that form, as ``model.form.Form.asked``."""
        return {"chat_template": self.chat_template, "split_special_tokens": self.split_special_tokens}

    def to_json(self) -> str:
        """JSON text with the format version; ``from_json`` reads it back."""
        document = {"format": "stableedit-config", "version": _FORMAT_VERSION, "editor": self.editor, **asdict(self)}
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls: type[_Config], text: str) -> _Config:
        """Read what ``to_json`` wrote; fields that are absent take their defaults. What states its version was written
        with all fields that this version had, and those that came later mean there what was done without them.

        Raises:
            ValueError: for text that is not JSON, another editor's config, a later version (naming the fields that are
                not known here) or an unknown field.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
        if not isinstance(document, dict):
            raise ValueError(f"expected a JSON object with the fields of {cls.__name__}")
        known = [field.name for field in fields(cls)]
        if "version" in document:
            document = {name: value for name, value in LATER_FIELDS.items() if name in known} | document
        version = document.pop("version", _FORMAT_VERSION)
        whole = isinstance(version, int) and not isinstance(version, bool)
        if document.pop("format", "stableedit-config") != "stableedit-config" or not whole or version < 1:
            raise ValueError(f"this is not a stableedit-config of version {_FORMAT_VERSION} (version is {version!r})")
        editor = document.pop("editor", cls.editor)
        if editor != cls.editor:
            raise ValueError(f"this is a config of the editor {editor!r}; {cls.__name__} is for {cls.editor!r}")
        for name, value in _EARLIER.items():
            if document.pop(name, value) != value:
                raise ValueError(f"{name} is no longer a field, and nothing but {json.dumps(value)} can be read for it")
        unknown = [name for name in document if name not in known]
        if version > _FORMAT_VERSION:
            which = f", among them {', '.join(map(repr, unknown))}, unknown here" if unknown else ""
            raise ValueError(
                f"this config is of version {version} and may have fields of another meaning{which}; this stableedit "
                f"reads versions up to {_FORMAT_VERSION}"
            )
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {with_nearest(unknown[0], known)}")
        return cls(**document)
