"""Which control variate an estimate has: the density's reference, or that and what each sample's own draws show."""

from __future__ import annotations

from ..support.host import chosen
from ..support.warn import warn
from .nodes import FittedNodes
from .planner import Wanted
from .samples import Samples
from .self_fitted import FEWEST_DRAWS

CONTROLS = ("auto", "reference", "self")
# Of images of fewer numbers nobody has measured whether it pays.
LEAST_DIMS = 192
# That residuals and noise of one sample may take in an estimate that did not ask for them. A number of its own, and not
# a share of the memory, since the same call has to give the same answer whatever the memory is.
MOST_BYTES = 1 << 28
TOO_MANY = f"residuals and noise of one sample may take more than {MOST_BYTES >> 20} MiB"


def check_control(control: str, method: str, nfe: int, masked: bool) -> None:
    """Raise ValueError for an unknown control, or where "self" is asked for and does not go with the rest of a call."""
    if not chosen(control, CONTROLS):
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}; got {control!r}")
    if control == "self" and (reason := why_not_self(method, nfe, masked)):
        raise ValueError(f'control="self" {reason}, or leave control="auto"')


def why_not_self(method: str, nfe: int, masked: bool) -> str | None:
    """Return the reason why a reference cannot be fitted to a sample's own draws, None where it can."""
    if method != "density":
        return f'is for method="density", got {method!r}; leave the method out'
    if masked:
        return "is for whole samples, got a mask; leave the mask out"
    if nfe < FEWEST_DRAWS:
        return f"needs nfe >= {FEWEST_DRAWS}, evaluations to fit a sample's residuals to, got {nfe}; give more"
    return None


def control_of(control: str, noise: str, nodes: FittedNodes, samples: Samples, wanted: Wanted) -> str:
    """Return "reference" or "self"; of "auto" what the samples and the last `fit` speak for.

    Arguments:
        control: one of `CONTROLS`.
        noise: that the density was made with.

    Raises:
        ValueError: as `check_control`.
    """
    check_control(control, wanted.method.name, wanted.nfe, samples.mask is not None)
    if control != "auto":
        return control
    reason = why_reference(noise, nodes, samples, wanted)
    if reason == TOO_MANY:
        warn(
            f'{TOO_MANY} at so many evaluations, so that control="auto" is "reference", whose errors on images are '
            'several times larger; give control="self", which keeps them, or average fewer evaluations over seeds'
        )
    return "self" if reason is None else "reference"


def why_reference(noise: str, nodes: FittedNodes, samples: Samples, wanted: Wanted) -> str | None:
    """Return the reason why "auto" is "reference", None where it is "self"; arguments as in `control_of`."""
    if (reason := why_not_tried(noise, samples, wanted)) is None and not bool(nodes.own_pays):
        return "fit measured that it leaves more variance on these data than the reference alone"
    return reason


def why_not_tried(noise: str, samples: Samples, wanted: Wanted) -> str | None:
    """Return the reason why "auto" is "reference" whatever `fit` measures, None where `fit` decides."""
    if reason := why_not_self(wanted.method.name, wanted.nfe, samples.mask is not None):
        return f'"self" {reason}'
    d = samples.x.shape[1]
    if len(samples.shape) != 3 or d < LEAST_DIMS:
        return f"samples are no images (C, H, W) of {LEAST_DIMS} numbers or more"
    if noise == "sobol":
        return 'noise="sobol" was asked for, and draws that are fitted to each other have independent noise'
    if 2 * max(wanted.nfe, wanted.most) * d * samples.x.element_size() > MOST_BYTES:
        return TOO_MANY
    return None
