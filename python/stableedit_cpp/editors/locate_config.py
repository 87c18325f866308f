"""What the configs of editors that locate facts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.files.words import check_whole

__all__ = ["LocateConfig"]

# Fields of editors that solve for value gradients; a value other than the default is refused, not ignored.
_OF_OTHERS = ("statistics", "micro_batch", "max_passes", "prompt_rows", "anchors", "replays")
_OF_OTHERS += ("retries_feed_statistics", "frozen_statistics")


@dataclass(frozen=True, kw_only=True)
class LocateConfig(EditorConfig):
    """What the editors share that locate facts (MEMIT, AlphaEdit): every request has a ``subject``, at whose last token
    keys are read and the model's answer is searched.

    The defaults end answers with a token and edit chats in the chat form; ``published`` is plain text without an end.
    Both find the subject by its characters, where released code replaces it in the prompt and goes wrong with another
    case or a second mention, and both read the model's own last layer.

    Attributes:
        edit_modules: output projections of MLPs (or of attention), each in a layer of its own and none in the model's
            last; None takes the published layers where the model is of a published family, else five MLPs from an
            eighth of the depth on. What is to be said is put into the output of the last one's layer.
        step_size: share of the change that is written, in (0, 1]; 1 as published.
        text_statistics: file of ``stableedit statistics`` with the second moments of the modules' keys over text,
            gathered with the unedited model.
        texts: files of text to gather that file from (``gather_statistics``), where it is not there yet; it takes
            minutes for a small model, and shows a bar.
        contexts: texts before a prompt, with the space between, in which it is looked at as well; None samples five
            from the model, once, when the editor is made.
        seed: of that sample.
        target_steps: of Adam, one less, to find what the layer is to give. target_learning_rate: of these steps.
        target_clamp: bound of the change, in lengths of what the layer gives now.
        target_kl: weight of KL(changed || unchanged) after the bare subject. target_decay: of the change's length, over
            the squared length of what the layer gives now.
        target_loss: a request whose loss is below it is done, in nats.
    """

    warms_up: ClassVar[bool] = False

    step_size: float = 1.0
    text_statistics: str | None = None
    texts: list[str] | None = None
    contexts: list[str] | None = None
    seed: int = 0
    target_steps: int = 25
    target_learning_rate: float = 0.5
    target_clamp: float = 0.75
    target_kl: float = 0.0625
    target_decay: float = 0.5
    target_loss: float = 0.05
    chat_template: bool | None = None
    end_of_answer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(EditorConfig):
            if field.name in _OF_OTHERS and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} has no meaning for the editor {self.editor!r}, which locates; leave it out"
                )
        if self.step_size == "auto" or self.step_size > 1:
            raise ValueError(f"step_size must be a share, at most 1, of what is found, not {self.step_size!r}")
        if self.text_statistics is not None and not (isinstance(self.text_statistics, str) and self.text_statistics):
            raise ValueError(f"text_statistics must be the path of a file, not {self.text_statistics!r}")
        self._check_texts("texts")
        self._check_texts("contexts")
        check_whole("seed", self.seed, 0)
        check_whole("target_steps", self.target_steps)
        for name in ("target_learning_rate", "target_clamp"):
            self._check_positive(name, getattr(self, name))
        for name in ("target_kl", "target_decay", "target_loss"):
            self._check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}")

    def placed(self) -> LocateConfig:
        def whole(path: str) -> str:
            return str(Path(path).absolute())

        texts = self.texts and [whole(text) if Path(text).exists() else text for text in self.texts]  # or of the hub
        return replace(self, text_statistics=self.text_statistics and whole(self.text_statistics), texts=texts)

    def _check_texts(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        value = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [None]
        if not all(isinstance(text, str) for text in value):
            raise ValueError(f"{name} must be a list of texts, not {getattr(self, name)!r}")
        object.__setattr__(self, name, value)
