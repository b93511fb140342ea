"""fastscore: the log-density of diffusion and score networks."""

from importlib.metadata import version

from .classify import Classification, DiffusionClassifier
from .density import ScoreDensity
from .discrete import Levels, discrete_log_prob
from .estimate import Comparison, Curve, Estimate
from .explain import explain
from .graph import CapturedDensity
from .probability_flow import FlowLogProb, probability_flow_log_prob
from .reference import Reference
from .schedules import DDPM, EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule
from .training.losses import density_loss

__version__ = version("fastscore")
__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "CapturedDensity",
    "Classification",
    "Comparison",
    "Cosine",
    "Curve",
    "DiffusionClassifier",
    "Estimate",
    "FlowLogProb",
    "FlowMatching",
    "Levels",
    "LiYan",
    "LogSNR",
    "Reference",
    "Schedule",
    "ScoreDensity",
    "density_loss",
    "discrete_log_prob",
    "explain",
    "probability_flow_log_prob",
]
