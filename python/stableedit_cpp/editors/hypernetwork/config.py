"""What the configs of editors with a hypernetwork share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.files.words import check_whole, with_nearest

__all__ = ["HypernetworkConfig", "modules_of_family"]


@dataclass(frozen=True, kw_only=True)
class HypernetworkConfig(EditorConfig):
    """An editor whose targets a hypernetwork makes, which is trained before it edits.

    Attributes:
        step_size, ridge: of every module before training, which learns one of each for each module. Numbers.
        hypernetwork: file of ``save_hypernetwork``: the network and the running statistics that the editor begins with.
            What ``edit_modules`` names must be the modules that it was trained for; step, ridge, sizes, statistics and
            micro-batches are those of the file. It is read when the editor is made and belongs to the editor's state
            from then on; the editor's own config has None. None begins with the identity.
        rank, blocks: of the network: per block two matrices of ``(k + v) * rank`` numbers, for each shape of module.
        unbiased_batches: see ``UltraEditConfig``.
        learning_rate: of Adam, which trains the network.
        locality_weight: of the divergence at unrelated prompts in the training loss.
        update_penalty: weight of the squared norm of a turn's updates in the training loss; 0 is none.
        clip: largest norm of the gradient of a training step, over all networks.
        epochs: passes over the training stream.
        seed: of the network's first weights.
    """

    keeps_edits: ClassVar[bool] = False  # whether the edits of a training turn stay for the next ones
    horizon: ClassVar[int] = 1
    discount: ClassVar[float] = 1.0
    past_sample: ClassVar[int | None] = None
    turns_per_step: ClassVar[int | None] = 1
    clip_each_turn: ClassVar[bool] = False

    step_size: float = 1e-6
    ridge: float = 1.0
    hypernetwork: str | None = None
    rank: int = 1920
    blocks: int = 2
    unbiased_batches: bool = False
    learning_rate: float = 1e-5
    locality_weight: float = 1.0
    update_penalty: float = 0.0
    clip: float = 1.0
    epochs: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size == "auto":
            raise ValueError("step_size must be a number: the hypernetwork learns one for each module, beginning there")
        if self.hypernetwork is not None and (not isinstance(self.hypernetwork, str) or not self.hypernetwork):
            raise ValueError(f"hypernetwork must be a file's name, or null, not {self.hypernetwork!r}")
        self._check_flag("unbiased_batches")
        for name in ("rank", "blocks", "epochs", "horizon"):
            check_whole(name, getattr(self, name))
        for name in ("turns_per_step", "past_sample"):
            check_whole(name, getattr(self, name), none=True)
        check_whole("seed", self.seed, 0)
        for name in ("learning_rate", "clip", "discount"):
            self._check_positive(name, getattr(self, name))
        for name in ("locality_weight", "update_penalty"):
            self._check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}")
        self._check_flag("clip_each_turn")


def modules_of_family(families: Mapping[str, list[str]], family: str | None) -> dict[str, list[str]]:
    """``edit_modules`` of a published setting, by its field's name; nothing for None.

    Raises:
        ValueError: for another family, with those that there are.
    """
    if family is None:
        return {}
    if family not in families:
        raise ValueError(f"there are no published modules for the model family {with_nearest(family, families)}")
    return {"edit_modules": list(families[family])}
