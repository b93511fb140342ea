"""Rows of the adapters, with stand-ins for the libraries' objects."""

import math
from types import MethodType, SimpleNamespace

import torch
from torch import Tensor, nn

import fastscore as fs
from fastscore import adapters
from fastscore.adapters.torchcfm import PATHS

from .common import NFE, D, Net, X, row, summary

OPTIONS = {"program": False}


def table_of():
    return torch.linspace(0.99, 0.02, 50)


class Wrapped(nn.Module):
    """A network under another library's interface, with what its object holds."""

    def __init__(self, call, **held):
        super().__init__()
        self.net, self.call = Net(), call
        for name, value in held.items():
            self.register_buffer(name, value) if isinstance(value, Tensor) else setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.call(self.net, *args, **kwargs)


def named(name, **attributes):
    return type(name, (), attributes)()


def from_diffusers(on):
    def net():
        return Wrapped(lambda net, x, timestep, **c: SimpleNamespace(sample=net(x, timestep, **c)))

    class Config(dict):  # as diffusers has them
        __getattr__ = dict.__getitem__

    config = Config(prediction_type="v_prediction", num_train_timesteps=20)
    table = SimpleNamespace(config=config, alphas_cumprod=table_of())
    options = dict.fromkeys(("shift", "shift_terminal", "invert_sigmas"), None) | {"num_train_timesteps": 1000}
    flow = named("FlowMatchEulerDiscreteScheduler", config=Config(options), sigma_min=0.01)
    noise = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
    edm = named("EDMEulerScheduler", config=Config(noise))
    model = on(net())
    average = SimpleNamespace(shadow_params=[p.detach().clone() for p in model.parameters()])
    return [
        adapters.from_diffusers(on(net()), table, **OPTIONS),
        adapters.from_diffusers(on(net()), edm, **OPTIONS),
        adapters.from_diffusers(model, table, ema=average, **OPTIONS),
        adapters.from_diffusers(on(net()), flow, time="t", **OPTIONS),
    ]


def from_azula(on):
    class Schedule:
        def __call__(self, t):
            return torch.cos(1.5 * t), torch.sqrt(1.0001 - torch.cos(1.5 * t) ** 2)

    made = Wrapped(lambda net, x, t: SimpleNamespace(mean=net(x, t)), schedule=Schedule())
    return [adapters.from_azula(on(made), **OPTIONS)]


def from_bayesflow(on):
    class Built(Wrapped):
        built = True

        def get_build_config(self):
            return {"shapes_dict": {"xz_shape": (None, D), "conditions_shape": (None, 2)}}

    class DiffusionModel(Built):
        def score(self, z_t, log_snr_t, conditions, training):
            return self.net(z_t.float(), log_snr_t[:, 0].float()) + conditions.float().sum(1, keepdim=True)

        def guidance_function(self):
            return None

    class FlowMatching(Built):
        def velocity(self, z_t, time, conditions, training):
            return self.net(z_t, time) + conditions.sum(1, keepdim=True)

    def noise(alpha):
        return named(
            "Noise",
            log_snr=lambda self, t, training: 10 - 16 * t,
            get_alpha_sigma=lambda self, at: (alpha(at), alpha(at) * torch.exp(-0.5 * at)),
        )

    flow = {"use_optimal_transport": False, "base_distribution": named("DiagonalNormal", mean=0.0, std=1.0)}
    flow |= {"loss_fn": named("MeanSquaredError")}
    preserving, exploding = (lambda at: torch.sigmoid(at).sqrt()), torch.ones_like
    one = torch.tensor([[0.1, -0.2]])
    return [
        adapters.from_bayesflow(on(DiffusionModel(None, noise_schedule=noise(preserving))), on(one), **OPTIONS),
        adapters.from_bayesflow(on(DiffusionModel(None, noise_schedule=noise(exploding))), one, **OPTIONS),
        adapters.from_bayesflow(on(FlowMatching(None, **flow)), one, **OPTIONS),  # an observation on the host
    ]


def from_edm(on):
    plain = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=0.5)
    rounded = Wrapped(lambda net, x, sigma: net(x, sigma), u=torch.linspace(80, 0, 30))
    return [adapters.from_edm(on(plain), **OPTIONS), adapters.from_edm(on(rounded), **OPTIONS)]


def from_flow_matching(on):
    cosine = named(
        "CosineScheduler",
        __call__=lambda self, t: SimpleNamespace(
            alpha_t=torch.sin(math.pi / 2 * t), sigma_t=torch.cos(math.pi / 2 * t),
            d_alpha_t=math.pi / 2 * torch.cos(math.pi / 2 * t), d_sigma_t=-math.pi / 2 * torch.sin(math.pi / 2 * t),
        ),
        snr_inverse=lambda self, snr: 2 / math.pi * torch.atan(snr),
    )  # fmt: skip
    return [adapters.from_flow_matching(on(Net()), path, **OPTIONS) for path in (None, cosine)]


def from_guided_diffusion(on):
    whole = {"alphas_cumprod": table_of().double().numpy(), "model_mean_type": "EPSILON", "rescale_timesteps": False}
    spaced = whole | {"rescale_timesteps": True, "timestep_map": range(0, 100, 2), "original_num_steps": 100}
    return [adapters.from_guided_diffusion(on(Net()), SimpleNamespace(**kept), **OPTIONS) for kept in (whole, spaced)]


def from_k_diffusion(on):
    plain = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=0.5)
    table = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=1.0, sigmas=torch.linspace(0.01, 80, 30))
    return [adapters.from_k_diffusion(on(plain), **OPTIONS), adapters.from_k_diffusion(on(table), **OPTIONS)]


def from_lucidrains(on):
    ratio = (1 / table_of().double() - 1).sqrt().float()
    kept = {"objective": "pred_noise", "sqrt_recipm1_alphas_cumprod": ratio}
    made = [Wrapped(None, **kept, normalize=lambda x: 2 * x - 1), Wrapped(None, **kept, normalize=lambda x: x)]
    for diffusion in made:
        diffusion.model = diffusion.net
    return [adapters.from_lucidrains(on(diffusion), **OPTIONS) for diffusion in made]


class VPScoreEstimator(Wrapped):
    def score(self, theta, condition, t):
        return self.net(theta + condition, t)


class FlowMatchingEstimator(VPScoreEstimator):
    def forward(self, theta, condition, t):
        return self.net(theta + condition, t)


def from_monai(on):
    kept = {"num_train_timesteps": 50, "prediction_type": "epsilon"}
    plain = named("DDPMScheduler", alphas_cumprod=table_of(), **kept)
    flow = named("RFlowScheduler", use_discrete_timesteps=True, **kept)
    return [adapters.from_monai(on(Net()), scheduler, **OPTIONS) for scheduler in (plain, flow)]


def from_sbi(on):
    kept = {
        "condition_shape": torch.Size([D]), "input_shape": torch.Size([D]), "mean_0": torch.full((D,), 0.1),
        "std_0": torch.full((D,), 1.5), "beta_min": 0.1, "beta_max": 10.0, "t_min": 1e-3, "t_max": 1.0,
        "noise_scale": 1e-3, "_theta_shift": torch.full((D,), 0.2), "_theta_scale": torch.full((D,), 2.0),
    }  # fmt: skip
    plain = {k: v for k, v in kept.items() if k != "noise_scale"}
    x = torch.full((D,), 0.3)
    return [
        adapters.from_sbi(on(VPScoreEstimator(None, **plain)), on(x), **OPTIONS),
        adapters.from_sbi(on(VPScoreEstimator(None, **plain)), x, **OPTIONS),  # an observation on the host
        adapters.from_sbi(on(FlowMatchingEstimator(None, **kept)), on(x), **OPTIONS),
    ]


def from_score_models(on):
    class ScoreModel(Wrapped):
        def score(self, t, x, *conditions):
            return self.net(x, t, *conditions)

    return [
        adapters.from_score_models(on(ScoreModel(None, sde=sde)), **OPTIONS)
        for sde in (
            named("VESDE", T=1, epsilon=1e-5, sigma_min=0.01, sigma_max=50.0),
            named("VPSDE", T=1, epsilon=1e-5, beta_min=0.1, beta_max=20.0),
        )
    ]


def from_score_sde(on):
    alpha = table_of().sqrt()
    vp = {"beta_0": 0.1, "beta_1": 20.0, "sqrt_alphas_cumprod": alpha, "sqrt_1m_alphas_cumprod": (1 - alpha**2).sqrt()}
    ve = {"sigma_min": 0.01, "sigma_max": 50.0, "discrete_sigmas": torch.logspace(-2, 1.7, 30)}
    kinds = [("VPSDE", vp, True), ("VPSDE", vp, False), ("subVPSDE", vp, True)]
    kinds += [("VESDE", ve, True), ("VESDE", ve, False)]
    return [adapters.from_score_sde(on(Net()), named(name, **held), whole, **OPTIONS) for name, held, whole in kinds]


def from_torchcfm(on):
    class TimeFirst(Net):
        def forward(self, t, x):
            return super().forward(x, t)

    paths = [("ConditionalFlowMatcher", 0.0), ("ConditionalFlowMatcher", 0.1), ("TargetConditionalFlowMatcher", 0.1)]
    paths += [("VariancePreservingConditionalFlowMatcher", 0.1)]

    def matcher(name, sigma):
        path = PATHS[name]

        def between(factors, x0, x1):
            return factors[0][:, None] * x0 + factors[1][:, None] * x1

        calls = {
            "compute_mu_t": lambda self, x0, x1, t: between(path.mean(t), x0, x1),
            "compute_sigma_t": lambda self, t: path.noise(t, sigma),
            "compute_conditional_flow": lambda self, x0, x1, t, x_t: between(path.rate(t), x0, x1),
        }
        return named(name, sigma=sigma, **calls)

    return [adapters.from_torchcfm(on(TimeFirst()), matcher(*path), **OPTIONS) for path in paths]


def from_model(on):
    net = Wrapped(lambda net, x, sigma: net(x, sigma), sigma_data=0.5, label_dim=0)
    net.forward = MethodType(lambda self, x, sigma: self.net(x, sigma), net)
    sde = named("VPSDE", beta_0=0.1, beta_1=20.0)
    return [fs.from_model(on(net), **OPTIONS), adapters.from_model(on(Net()), sde, **OPTIONS)]


@row(each=adapters.__all__)
def adapter(on, name):
    assert name in globals(), f"the adapter {name} needs a function of its name in {__file__}, such as from_torchcfm's"
    found = []
    for made in globals()[name](on):
        inner = getattr(made, "density", made)
        found += [inner.schedule.log_snr_range, summary(made.estimate(on(X), nfe=NFE))]
    # Wrapped on the host, used there, and then the network alone goes to the device.
    for made in globals()[name](lambda v: v):
        made.estimate(X, nfe=NFE)
        inner = getattr(made, "density", made)
        for child in inner.model.children() if inner.model.__module__.startswith("fastscore") else [inner.model]:
            on(child)
        found.append(summary(made.estimate(on(X), nfe=NFE)))
    return found
