"""What the configs of editors that train share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.files.words import check_whole

__all__ = ["TrainedConfig"]

# Fields of editors that solve; a value other than the default is refused, not ignored.
_OF_SOLVERS = ("ridge", "statistics", "max_passes", "prompt_rows", "anchors", "retries_feed_statistics")
_OF_SOLVERS += ("frozen_statistics", "past_key_weight")


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(EditorConfig):
    """What the editors share that find their change by gradient descent, breadth-first: epochs over the whole turn.

    The defaults are corrected where released code is at fault: the loss is read along the answer and not at the last
    token of the prompt alone, the end of the answer is learnt, chats are edited in the chat form, and a turn is trained
    no longer than it takes. A half-precision weight is always trained in float32.

    Attributes:
        step_size: learning rate of Adam.
        micro_batch: statements a step of Adam.
        epochs: at most so many over the statements of a turn.
        stop_loss: a batch whose loss is below makes no step, and an epoch whose mean loss is below is the last, in nats
            a token; 0 goes on to the end.
        stop_when_taken: the same for a batch, and for an epoch, all of which has taken (``take_probability``).
        objective: "target", the cross-entropy along the answer; or "prompt_last", in which all tokens of the answer are
            read from the one distribution after the prompt, as in the FT and FT-L of most published tables.
        average: of the loss of a batch over its "sample" (each statement weighs the same, whatever its length) or
            over its "token".
        shuffle: the order of each epoch, drawn by what is edited; else that of the turn.
        cumulative: a turn begins again with the unedited weights and trains on all statements so far, as breadth-first
            tuning has it: the whole stream's work grows with the square of its length.
        keep_share: of the entries of each weight's change, in (0, 1], those that are largest beside the weight (RECT,
            which keeps .4); 1 keeps all.
        replays: without ``cumulative``, at most so many statements of earlier turns among those of a turn.
    """

    warms_up: ClassVar[bool] = False

    step_size: float = 5e-4
    epochs: int = 25
    stop_loss: float = 0.01
    stop_when_taken: bool = True
    objective: Literal["target", "prompt_last"] = "target"
    average: Literal["sample", "token"] = "sample"
    shuffle: bool = True
    cumulative: bool = False
    keep_share: float = 1.0
    take_probability: float = 0.4
    chat_template: bool | None = None
    end_of_answer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(self)}
        for name in _OF_SOLVERS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} has no meaning for the editor {self.editor!r}, which trains; leave it out")
        self._check_number("step_size", self.step_size)
        self._check_number("stop_loss", self.stop_loss)
        if self.stop_loss < 0:
            raise ValueError(f"stop_loss must be at least 0, not {self.stop_loss!r}")
        self._check_choice("objective", ("target", "prompt_last"))
        self._check_choice("average", ("sample", "token"))
        for name in ("stop_when_taken", "shuffle", "cumulative"):
            self._check_flag(name)
        check_whole("epochs", self.epochs)
        self._check_positive("keep_share", self.keep_share)
        if self.keep_share > 1:
            raise ValueError(f"keep_share must be at most 1, not {self.keep_share!r}")
        if self.cumulative and self.replays:
            raise ValueError(
                "replays have no meaning with cumulative, which trains on all statements so far; leave one out"
            )
