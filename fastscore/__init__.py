"""fastscore: the log-density of diffusion and score networks."""

from importlib.metadata import version

from .density import ScoreDensity
from .estimate import Comparison, Curve, Estimate
from .reference import Reference
from .schedules import DDPM, EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule

__version__ = version("fastscore")
__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "Comparison",
    "Cosine",
    "Curve",
    "Estimate",
    "FlowMatching",
    "LiYan",
    "LogSNR",
    "Reference",
    "Schedule",
    "ScoreDensity",
]
