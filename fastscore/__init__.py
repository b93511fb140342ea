"""fastscore: the log-density of diffusion and score networks."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if not Path(__file__).with_name("kernels").exists():  # in a clone they lie beside this folder, in a wheel inside of it
    __path__.append(str(Path(__file__).parent.parent))

from .classify.classifier import Classification, DiffusionClassifier
from .densities.bound_estimate import BoundEstimate
from .densities.difference import compare_densities
from .densities.discrete import Levels, discrete_log_prob
from .densities.distribution import as_distribution
from .densities.latent_bound import LatentBound
from .densities.probability_flow import FlowLogProb, probability_flow_log_prob
from .densities.transformed import Transformed
from .densities.zero_mean import ZeroMeanDensity
from .density import ScoreDensity
from .estimator.captured import CapturedDensity
from .estimator.comparison import Comparison
from .estimator.estimate import Curve, Estimate
from .process.conditional_flow import ConditionalFlow
from .process.conditions import per_sample, shared
from .process.ddpm import DDPM
from .process.schedules import EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule
from .process.table_twin import ContinuousDDPM
from .program.explain import explain, explain_program
from .reference.gaussians import Reference
from .training.diffusion_loss import DiffusionLoss
from .training.gan import score_regularization
from .training.losses import density_loss
from .training.nodes import AdaptiveNodes
from .training.weights import density_weights, elbo_weights

if TYPE_CHECKING:
    from .adapters import from_model
    from .runs import evaluate_dataset

__version__ = version("fastscore")
__all__ = [
    "DDPM",
    "EDM",
    "VE",
    "VP",
    "AdaptiveNodes",
    "BoundEstimate",
    "CapturedDensity",
    "Classification",
    "Comparison",
    "ConditionalFlow",
    "ContinuousDDPM",
    "Cosine",
    "Curve",
    "DiffusionClassifier",
    "DiffusionLoss",
    "Estimate",
    "FlowLogProb",
    "FlowMatching",
    "LatentBound",
    "Levels",
    "LiYan",
    "LogSNR",
    "Reference",
    "Schedule",
    "ScoreDensity",
    "Transformed",
    "ZeroMeanDensity",
    "as_distribution",
    "compare_densities",
    "density_loss",
    "density_weights",
    "discrete_log_prob",
    "elbo_weights",
    "evaluate_dataset",
    "explain",
    "explain_program",
    "from_model",
    "per_sample",
    "probability_flow_log_prob",
    "score_regularization",
    "shared",
]

for _kind in (value for name, value in list(globals().items()) if name in __all__ and isinstance(value, type)):
    if "__init__" in vars(_kind):
        _kind.__init__.__doc__ = _kind.__doc__  # else help() shows that of nn.Module


if not TYPE_CHECKING:  # a checker would take every other name for one that is there

    def __getattr__(name: str) -> object:
        """Import what reads and writes files, and what knows other libraries, when somebody asks for it."""
        if name == "evaluate_dataset":
            from .runs import evaluate_dataset

            return evaluate_dataset
        if name == "from_model":
            from .adapters import from_model

            return from_model
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
