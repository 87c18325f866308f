"""Metrics of an edited model; knows nothing of editors."""

from stableedit_cpp.evaluation.generation import generate
from stableedit_cpp.evaluation.locality import UneditedAnswers
from stableedit_cpp.evaluation.scores import DEFAULT_METRICS, METRICS, Score, Scores, evaluate

__all__ = ["DEFAULT_METRICS", "METRICS", "Score", "Scores", "UneditedAnswers", "evaluate", "generate"]
