"""Metrics of an edited model; knows nothing of editors."""

from stableedit_cpp.evaluation.generation import generate
from stableedit_cpp.evaluation.scores import METRICS, Score, Scores, evaluate

__all__ = ["METRICS", "Score", "Scores", "evaluate", "generate"]
