"""StableEdit: whitening with the running covariance of the value gradients."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from stableedit_cpp.core import LifelongNormalizer, WhiteningOptions
from stableedit_cpp.editors.config import PLAIN, EditorConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.editors.solver import Solver

__all__ = ["StableEdit", "StableEditConfig"]


@dataclass(frozen=True, kw_only=True)
class StableEditConfig(EditorConfig):
    """StableEdit (Algorithm 1): Lifelong Normalization with full whitening of the value gradients.

    The defaults make edits take as a person sees them, with no step size to find and no warm-up, a single fact like
    many: each turn is solved up to ten times, with the step that its loss asks for, until the model's free answer is
    the target and then stops; in the chat form where the model has one, with past keys, and with anchors that hold
    unrelated answers. Measured in docs/closed-loop.md. ``published``, ``one_pass`` and ``closed_loop`` are other
    settings.

    Attributes:
        whitening: "full" (Sigma^(-1/2)), "diagonal" (ULTRAEDIT's) or "none" (the no-LN ablation).
        warm_up_whitening: the same for the warm-up turns; the published code whitens these diagonally.
        floor: lower bound on the eigenvalues of the covariance, >= 0.
        refresh: reuse a whitening transform until the number of samples has grown by this fraction, in [0, 1]; 0
            computes it anew every turn, as published.
        centred: whiten the value gradients about their running mean, and weight targets by the squared norms of the
            normalised keys, as published. False whitens by the second moment about zero and does not weight: then an
            update never raises the loss to first order, however few rows there are, one fact's included. None is False
            where the step is automatic, and True for a number, since step sizes are stated for the published update.
        floor_mode: "relative" to the mean eigenvalue, which suits any model and loss scale, or "absolute" (published).
    """

    editor: ClassVar[str] = "stableedit"

    whitening: Literal["full", "diagonal", "none"] = "full"
    warm_up_whitening: Literal["full", "diagonal", "none"] | None = None
    floor: float = 0.1
    floor_mode: Literal["relative", "absolute"] = "relative"
    refresh: float = 0.1
    centred: bool | None = None
    step_size: float | Literal["auto"] = "auto"
    max_passes: int = 10
    take_probability: float = 0.4
    anchors: int = 96
    replays: int = 192
    retries_feed_statistics: bool = False
    past_key_weight: float = 0.02
    chat_template: bool | None = None
    end_of_answer: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("none", "diagonal", "full")
        self._check_choice("whitening", modes)
        if self.warm_up_whitening is None:
            weaker = min(self.whitening, "diagonal", key=modes.index)
            object.__setattr__(self, "warm_up_whitening", weaker)
        self._check_choice("warm_up_whitening", modes[: modes.index(self.whitening) + 1])
        self._check_choice("floor_mode", ("relative", "absolute"))
        if self.centred is not None:
            self._check_flag("centred")
        self._check_number("floor", self.floor)
        if self.floor < 0:
            raise ValueError(f"floor must be at least 0, not {self.floor!r}")
        self._check_number("refresh", self.refresh)
        if not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh must be a fraction between 0 and 1, not {self.refresh!r}")

    @classmethod
    def one_pass(cls, **changes) -> StableEditConfig:
        """The default of version 0.1: one pass of step 3.5e-4 a turn, on plain text in which control tokens are parsed.
        It is fast, wants a warm-up, and leaves nearly half of the edits undone (docs/benchmarks.md); the ablations are
        those of it."""
        preset = {field.name: field.default for field in fields(EditorConfig)}
        preset |= {"centred": True, **PLAIN}
        return cls(**(preset | changes))

    @classmethod
    def closed_loop(cls, **changes) -> StableEditConfig:
        """Up to five passes of a smaller step a turn, a margin and past keys: nearly all edits hold, at several times
        the work; for a round of ``lifelong.repair`` afterwards, and ``editor.shrink`` where other answers
        matter more. Found on SmolLM2-135M with ZsRE (docs/closed-loop.md)."""
        preset = {"step_size": 2e-4, "max_passes": 5, "take_probability": 0.4, "past_key_weight": 0.02}
        return cls.one_pass(**(preset | {"retries_feed_statistics": False} | changes))

    @classmethod
    def published(cls, *, edit_modules: list[str] | None = None, step_size: float, **changes) -> StableEditConfig:
        """The procedure of the published code: pooled statistics, diagonal warm-up turns, Psi0 = 0, division by
        nu - v - 1, absolute eigenvalue floor 1e-6, ridge 10, turns of 100 in micro-batches of 10."""
        preset = {"floor": 1e-6, "floor_mode": "absolute", "ridge": 10.0, "statistics": "shared"}
        preset |= {"whitening": "full", "warm_up_whitening": "diagonal", "refresh": 0.0}
        return cls.one_pass(edit_modules=edit_modules, step_size=step_size, **(preset | changes))


class _Solver(Solver):
    config: StableEditConfig

    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        config = self.config
        whitening = WhiteningOptions(
            mode=config.whitening,
            floor=config.floor,
            floor_mode=config.floor_mode,
            refresh=config.refresh,
            centred=config.step_size != "auto" if config.centred is None else config.centred,
        )
        return LifelongNormalizer(key_dim, value_dim, whitening=whitening)

    def _warm_up_mode(self) -> str | None:
        return self.config.warm_up_whitening


class StableEdit(Editor):
    """StableEdit (Algorithm 1). With a numeric step, warm up on a training stream first: without it the first turns
    rest on few samples.

    As published, a turn with keys H and value gradients G in one module is equivalent to

        normalizer.observe(H, G)                                  # (m, kappa, Psi, nu), key mean and std
        g_hat = (G - m) @ inverse_root(floored(Psi / (nu - v - 1)))
        V = -step_size * h_hat.square().sum(1, keepdim=True) * g_hat
        weight += torch.linalg.solve(H.T @ H + ridge * I, H.T @ V).T
    """

    config: StableEditConfig
    config_class = StableEditConfig
    solver_class = _Solver
    edits_experts = True
    edits_split = True


def _ablation(name: str, summary: str, *, warm_up: bool = True, **changes: object) -> NamedEditor:
    return NamedEditor(name, StableEditConfig.one_pass(**changes), warm_up, summary, ablation=True)


register_editor(
    StableEdit,
    NamedEditor(
        "stableedit",
        StableEditConfig(),
        False,
        "the default: an automatic step, solved again until the free answer is the target and stops",
    ),
    NamedEditor(
        "one-pass",
        StableEditConfig.one_pass(),
        summary="the default of version 0.1: one pass of a fixed step; what the ablations leave a part out of",
    ),
    NamedEditor(
        "stableedit-published",
        StableEditConfig.published(step_size=StableEditConfig.one_pass().step_size),
        summary="StableEdit as its code has it: absolute floor 1e-6, a decomposition every turn",
    ),
    NamedEditor(
        "closed-loop",
        StableEditConfig.closed_loop(),
        summary="StableEdit that checks each turn and solves again, with past keys: nearly all edits hold",
    ),
    _ablation("no-ln", "no Lifelong Normalization: keys and value gradients as they are", whitening="none"),
    _ablation("no-warm-up", "no training stream first", warm_up=False),
    _ablation("diagonal", "per-dimension instead of full whitening", whitening="diagonal"),
    _ablation("per-module", "statistics of each module apart instead of pooled by shape", statistics="per_module"),
    _ablation(
        "absolute-floor", "eigenvalue floor 1e-6 instead of relative to the mean", floor_mode="absolute", floor=1e-6
    ),
    _ablation("frozen-statistics", "statistics of the warm-up, never updated after it", frozen_statistics=True),
)
