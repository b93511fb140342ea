"""fastscore: the log-density of diffusion and score networks."""

from importlib.metadata import version

from .classify import Classification, DiffusionClassifier
from .conditional_flow import ConditionalFlow
from .conditions import per_sample, shared
from .density import ScoreDensity
from .discrete import Levels, discrete_log_prob
from .estimate import Comparison, Curve, Estimate
from .explain import explain
from .graph import CapturedDensity
from .probability_flow import FlowLogProb, probability_flow_log_prob
from .reference import Reference
from .schedules import DDPM, EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule
from .training.diffusion_loss import DiffusionLoss
from .training.gan import score_regularization
from .training.losses import density_loss
from .training.nodes import AdaptiveNodes
from .training.weights import density_weights, elbo_weights
from .transformed import Transformed
from .zero_mean import ZeroMeanDensity

__version__ = version("fastscore")
__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "AdaptiveNodes",
    "CapturedDensity",
    "Classification",
    "Comparison",
    "ConditionalFlow",
    "Cosine",
    "Curve",
    "DiffusionClassifier",
    "DiffusionLoss",
    "Estimate",
    "FlowLogProb",
    "FlowMatching",
    "Levels",
    "LiYan",
    "LogSNR",
    "Reference",
    "Schedule",
    "ScoreDensity",
    "Transformed",
    "ZeroMeanDensity",
    "density_loss",
    "density_weights",
    "discrete_log_prob",
    "elbo_weights",
    "explain",
    "per_sample",
    "probability_flow_log_prob",
    "score_regularization",
    "shared",
]
