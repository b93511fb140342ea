"""Which adapter an object needs, by the library that its class comes from, or by the interface where there is none.

Nothing is imported to find out: a library whose object is here has been imported by whoever made it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..estimator.protocol import Density
from ..support.host import kind_of
from .azula import from_azula
from .bayesflow import from_bayesflow
from .checks import refuse_what_is_read
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
from .wrappers import bare

Adapter = Callable[..., Density]

PACKAGES: dict[str, Adapter] = {
    "azula": from_azula,
    "bayesflow": from_bayesflow,
    "denoising_diffusion_pytorch": from_lucidrains,
    "diffusers": from_diffusers,
    "flow_matching": from_flow_matching,
    "guided_diffusion": from_guided_diffusion,
    "k_diffusion": from_k_diffusion,
    "monai": from_monai,
    "sbi": from_sbi,
    "score_models": from_score_models,
    "torchcfm": from_torchcfm,
}


def from_model(x: object, *more: Any, **options: Any) -> Density:
    """Return the density of another library's object, by the adapter that knows it.

    The library is that of the class of `x`, or of an object given with it, and of what these inherit from; objects of
    EDM, score_sde, guided-diffusion and denoising-diffusion-pytorch, whose code is copied more often than installed,
    are known by their attributes and arguments too. `torch.compile`, `DataParallel`, `DistributedDataParallel`,
    `AveragedModel` and the EMA of ema_pytorch are looked through, here and by every adapter. No library is imported.

    Arguments:
        x: a network, or what holds one: a pipeline of diffusers, a posterior of sbi, a solver of flow_matching, ...
        more: what the adapter takes beside it: diffusers' scheduler, the observation of sbi, the sde of score_sde.
        options: of the adapter and of `ScoreDensity`.

    Returns:
        `Density`: a `ScoreDensity` or a `Transformed` one, as the adapter says.

    Raises:
        TypeError: if no adapter knows the objects, or several do; as the adapter.
        ValueError: for a pipeline with several networks; as the adapter.

    Example:
        >>> from_model(pipeline).estimate(latents, encoder_hidden_states=text)
        >>> from_model(unet, scheduler), from_model(posterior, observation), from_model(edm_network)
    """
    found = adapters_of(x, *more)
    if len(found) != 1:
        raise TypeError(_refusal((x, *more), found))
    refuse_what_is_read(found[0], "from_model", options)
    return found[0](*_opened(x), *more, **options)


def adapters_of(x: object, *more: object) -> list[Adapter]:
    """Return the adapters that know these objects, whatever they say of their details."""
    return _by_package((x, *more)) or _by_interface(x, *more)


def _opened(x: object) -> tuple[object, ...]:
    """Return what holds a network as what its adapter takes; another object as it is."""
    package = _packages(x)
    if "diffusers" in package and not isinstance(x, nn.Module) and hasattr(x, "scheduler"):
        held = {
            name: part
            for name, part in sorted(vars(x).items())
            if name.startswith(("unet", "transformer")) and isinstance(part, nn.Module)
        }
        if len(held) != 1:
            raise ValueError(
                f"{type(x).__name__} must hold one network, got {', '.join(held) or 'none'}; give the one that "
                "denoises the data, and pipeline.scheduler"
            )
        return *held.values(), x.scheduler
    return (x,)


def _packages(thing: object) -> set[str]:
    """Return the packages of an object's class, and of all that it inherits from."""
    own = bare(thing) if isinstance(thing, nn.Module) else thing
    return {base.__module__.partition(".")[0] for base in type(own).__mro__}


def _by_package(things: tuple[object, ...]) -> list[Adapter]:
    packages = set().union(*map(_packages, things))
    return [make for name, make in PACKAGES.items() if name in packages]


def _by_interface(x: object, *more: object) -> list[Adapter]:
    """Return the adapters of libraries without a package, or whose code is copied, by what the objects have."""
    own = bare(x) if isinstance(x, nn.Module) else x
    return [make for make, has in INTERFACES.items() if has(own, *more)]


def _is_edm(net: object, *more: object) -> bool:
    """Whether a network is called as net(x, sigma, class_labels) and says its noise or its data's scale."""
    if more or not isinstance(net, nn.Module):
        return False
    second = list(inspect.signature(net.forward).parameters)[1:2]
    says = hasattr(net, "sigma_data") or (hasattr(net, "sigma_min") and hasattr(net, "sigma_max"))
    return second == ["sigma"] and hasattr(net, "label_dim") and says


def _is_score_sde(net: object, *more: object) -> bool:
    sde = more[0] if more else None
    known = type(sde).__name__.lower().endswith(("vpsde", "vesde"))
    return known and (hasattr(sde, "beta_0") or hasattr(sde, "discrete_sigmas"))


def _is_guided_diffusion(net: object, *more: object) -> bool:
    return bool(more) and hasattr(more[0], "model_mean_type") and hasattr(more[0], "alphas_cumprod")


def _is_lucidrains(net: object, *more: object) -> bool:
    return not more and all(hasattr(net, name) for name in ("objective", "sqrt_recipm1_alphas_cumprod", "model"))


INTERFACES: dict[Adapter, Callable[..., bool]] = {
    from_edm: _is_edm,
    from_guided_diffusion: _is_guided_diffusion,
    from_lucidrains: _is_lucidrains,
    from_score_sde: _is_score_sde,
}


def _refusal(things: tuple[object, ...], found: list[Adapter]) -> str:
    """Return what was got, which adapters there are, and what to do."""
    got = " and ".join(f"{kind_of(thing)} of {type(thing).__module__}" for thing in things)
    if found:
        names = " and ".join(make.__name__ for make in found)
        return (
            f"from_model needs objects that one adapter knows, got {got}, which {names} do; call the right one of them"
        )
    names = ", ".join(sorted({make.__name__ for make in (*PACKAGES.values(), *INTERFACES)}))
    return (
        f"from_model needs an object that one of {names} knows, got {got}; call one of them, or build "
        "fastscore.ScoreDensity(model, schedule, predicts=...) with the schedule and the prediction of training"
    )
