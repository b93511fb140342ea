"""Evaluation of a data set, over blocks, files and processes, that can be interrupted and resumed."""

from .evaluate import evaluate_dataset
from .ranks import Ranks

__all__ = ["Ranks", "evaluate_dataset"]
