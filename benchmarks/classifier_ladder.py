"""Climb classifiers' ladders of evaluations on the same images, in turns, and say what each needs for an accuracy.

Seconds are the process's own (`time.process_time`) in one thread for one pass over all images. Cheap efforts run with
several seeds, and a row is the mean over them: an accuracy moves by an image or two with the noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from classifier_measures import measures
from torch import Tensor

SEEDED = 32  # draws a class over which the seeds of an effort are spread: 4 seeds at 8 draws, 1 from 32 on
MOST_SEEDS = 4


class Outcome(NamedTuple):
    """What a classifier says of all images.

    Attributes:
        prediction: classes, int64, shape (B,).
        evaluations: of the network, an image, all classes together.
        probability: posterior, float64, shape (B, C); None where there is none.
        decided: share of the images of which all classes but one were dropped; None without elimination.
        errors: mean of |eps - eps_hat|^2, where that is what is estimated, shape (B, C).
    """

    prediction: Tensor
    evaluations: float
    probability: Tensor | None = None
    decided: float | None = None
    errors: Tensor | None = None


@dataclass
class Classifier:
    """One way to classify, with the draws a class to try, and what came of them."""

    name: str
    run: Callable[[int, int], Outcome]  # of (draws, seed)
    ladder: Sequence[int]
    fit: float | None = None  # seconds spent on data beforehand
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def reaches(self, accuracy: float) -> dict | None:
        """Return the row of the least effort from which on no accuracy is lower than this."""
        lower = [i for i, row in enumerate(self.rows) if row["accuracy"] < accuracy]
        enough = self.rows[lower[-1] + 1 :] if lower else self.rows
        return enough[0] if enough else None


def climb(classifiers: list[Classifier], truth: Tensor) -> None:
    """Run every effort of every classifier, those of the same number of draws one after the other."""
    for draws in sorted({draws for one in classifiers for draws in one.ladder}):
        running = [one for one in classifiers if draws in one.ladder]
        runs = {one.name: [] for one in running}
        for seed in range(max(1, min(MOST_SEEDS, SEEDED // draws))):
            for one in running:
                start = time.process_time()
                outcome = one.run(draws, seed)
                runs[one.name].append((outcome, time.process_time() - start))
        for one in running:
            one.outcomes[draws] = runs[one.name][-1][0]
            one.rows.append(_row(one, draws, runs[one.name], truth))


def _row(one: Classifier, draws: int, runs: list[tuple[Outcome, float]], truth: Tensor) -> dict:
    outcomes, seconds = zip(*runs)
    posteriors = [measures(o.probability, truth) for o in outcomes if o.probability is not None]
    known = {key: statistics.mean(m[key] for m in posteriors) for key in posteriors[0]} if posteriors else {}
    return {
        "classifier": one.name,
        "draws a class": draws,
        "evaluations an image": statistics.mean(o.evaluations for o in outcomes),
        "s": statistics.mean(seconds),
        "accuracy": statistics.mean(float((o.prediction == truth).double().mean()) for o in outcomes),
        "seeds": len(runs),
        "negative log-posterior": known.get("negative log-posterior"),
        "calibration error": known.get("calibration error"),
        "decided": outcomes[0].decided,
        "fit, s": one.fit,
    }


def comparison(classifiers: list[Classifier], peer: Classifier, accuracy: float) -> list[dict]:
    """Return a line a classifier: the least effort that reaches an accuracy, and the peer's beside it."""
    lines, beside = [], peer.reaches(accuracy)
    for one in classifiers:
        line = {"accuracy": accuracy, "classifier": one.name}
        line |= dict.fromkeys(["draws a class", "evaluations an image", "s", "peer / its evaluations", "peer / its s"])
        if found := one.reaches(accuracy):
            line |= {key: found[key] for key in ("draws a class", "evaluations an image", "s")}
            line["peer / its evaluations"] = beside["evaluations an image"] / found["evaluations an image"]
            line["peer / its s"] = beside["s"] / found["s"]
        lines.append(line)
    return lines
