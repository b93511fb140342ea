"""The earlier name of `fastscore.runs`, where the evaluation of whole data sets lives now."""

from .runs import Ranks, evaluate_dataset

__all__ = ["Ranks", "evaluate_dataset"]
