"""Densities of other libraries' networks: one function an ecosystem, none of which is imported.

Each reads schedule, prediction and time convention off the library's own objects; docs/adapters.md lists them, and
`from_model` finds the one that an object needs.
"""

from .any_model import from_model
from .azula import from_azula
from .bayesflow import from_bayesflow
from .diffusers import from_diffusers
from .edm import from_edm
from .flow_matching import from_flow_matching
from .guided_diffusion import from_guided_diffusion
from .k_diffusion import from_k_diffusion
from .lucidrains import from_lucidrains
from .monai import from_monai
from .sbi import from_sbi
from .score_models import from_score_models
from .score_sde import from_score_sde
from .torchcfm import from_torchcfm

__all__ = [
    "from_azula",
    "from_bayesflow",
    "from_diffusers",
    "from_edm",
    "from_flow_matching",
    "from_guided_diffusion",
    "from_k_diffusion",
    "from_lucidrains",
    "from_model",
    "from_monai",
    "from_sbi",
    "from_score_models",
    "from_score_sde",
    "from_torchcfm",
]
