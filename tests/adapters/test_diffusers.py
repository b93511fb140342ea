"""diffusers: its own networks, schedulers and add_noise, and exact networks in its own model class."""

import math
import warnings
from functools import partial

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastscore as fs
from fastscore.adapters import from_diffusers
from fastscore.process.predictions import coefficients, eps_from

diffusers = pytest.importorskip("diffusers")
EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
UNet2DOutput = pytest.importorskip("diffusers.models.unets.unet_2d").UNet2DOutput
TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def unet(out_channels=1):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    ).eval()


def conditional_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
    ).eval()


def ddpm(kind="DDPMScheduler", **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(diffusers, kind)(**config)


@pytest.mark.parametrize(
    ("build", "channels", "cond"),
    [
        (unet, 1, {"class_labels": torch.tensor([0, 1, 2, 1, 0])}),
        (lambda: unet(2), 1, {"class_labels": torch.tensor([0, 1, 2, 1, 0])}),
        (conditional_unet, 2, {"encoder_hidden_states": torch.randn(5, 4, 6)}),
        (dit, 2, {"class_labels": torch.tensor([0, 1, 2, 9, 3])}),
    ],
    ids=["UNet2DModel", "learned-variance", "UNet2DConditionModel", "DiT"],
)
def test_outputs_are_those_of_the_model_itself(build, channels, cond):
    model = build()
    density = from_diffusers(model, ddpm(), program=False)
    x_t, t = torch.randn(5, channels, 8, 8), torch.tensor([0, 10, 300, 700, 999])
    with torch.no_grad():
        assert torch.equal(density.model(x_t, t, **cond), model(x_t, timestep=t, **cond).sample)
        # Twice the channels are cut off, and every sample keeps its own condition.
        pair = {k: v[:2] for k, v in cond.items()}
        found = density.estimate(x_t[:2], nfe=4, **pair).log_prob
        other = density.estimate(x_t[:2], nfe=4, **{k: v.flip(0) for k, v in pair.items()}).log_prob
    assert float((found - other).abs().min()) > 1e-3


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_noise_is_added_as_the_scheduler_adds_it(kind, beta_schedule):
    scheduler = ddpm(kind, beta_schedule=beta_schedule)
    schedule = from_diffusers(nn.Identity(), scheduler).schedule
    t = torch.arange(0, 1000)
    x, eps, x_t = noised(schedule, t)
    own = scheduler.add_noise(x, eps, t)
    if kind == "DPMSolverMultistepScheduler":  # it stores sigmas from noisy to clean
        own = torch.stack([scheduler.alpha_t[i] * x[i] + scheduler.sigma_t[i] * eps[i] for i in t])
    # 1 - alphas_cumprod is the library's float32; both sides take roots of the same number.
    assert relative(x_t, own) < 1e-6


def test_euler_scales_to_the_same_input():
    scheduler = ddpm("EulerDiscreteScheduler")
    scheduler.set_timesteps(1000)
    schedule = from_diffusers(nn.Identity(), scheduler).schedule
    steps = scheduler.timesteps.long()
    x, eps, x_t = noised(schedule, steps)
    for i in (0, 1, 500, 998, 999):
        t = scheduler.timesteps[i]
        exploding = x[i] + scheduler.sigmas[i].double() * eps[i]
        scheduler._step_index = None
        own = scheduler.scale_model_input(exploding, t)
        assert float(t) == int(steps[i])
        assert relative(x_t[i], own) < 1e-6


@pytest.mark.parametrize("name", TYPES)
def test_predictions_become_data_as_in_the_scheduler(name):
    scheduler = ddpm(prediction_type=name, clip_sample=False)
    density = from_diffusers(nn.Identity(), scheduler)
    assert density.predicts == TYPES[name]
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    x, eps, x_t = noised(density.schedule, t)
    output = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, t))
    alpha, sigma = (column(v, x) for v in density.schedule.alpha_sigma(t))
    ours = (x_t - sigma * (c_f * output + c_x * x_t)) / alpha
    own = [scheduler.step(output[i : i + 1], int(t[i]), x_t[i : i + 1]).pred_original_sample for i in range(len(t))]
    for i in range(len(t)):
        assert relative(ours[i], own[i][0]) < 1e-6
    if name == "v_prediction":
        a, b, _ = (column(c, x) for c in coefficients("v", density.schedule, t))
        assert relative(a * eps + b * x, scheduler.get_velocity(x, eps, t)) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_noise_velocity_and_time(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    seen = []

    class Recorder(nn.Module):
        def forward(self, hidden_states, timestep):
            seen.append(timestep)
            return UNet2DOutput(sample=hidden_states)

    density = from_diffusers(Recorder(), scheduler, time="t")
    index = torch.arange(1, 1000, 111)  # entry 0 is pure noise
    least = float(scheduler.sigmas.min())
    sigma = scheduler.sigmas[index].double()
    x, eps, x_t = noised(density.schedule, sigma)
    own = scheduler.scale_noise(x, scheduler.timesteps[index], eps)
    assert relative(x_t, own) < 1e-6
    density.model(x_t, sigma)
    assert relative(seen[0], scheduler.timesteps[index].double()) < 1e-6
    a, b, _ = (column(c, x) for c in coefficients("flow", density.schedule, sigma))
    velocity = a * eps + b * x
    assert relative(velocity, eps - x) < 1e-12
    # One Euler step of the library along the exact velocity arrives at its next noise level.
    scheduler.set_timesteps(50)
    step = scheduler.step(
        (eps - x)[0], scheduler.timesteps[20], scheduler.sigmas[20] * eps[0] + (1 - scheduler.sigmas[20]) * x[0]
    )
    following = scheduler.sigmas[21]
    assert relative(step.prev_sample, following * eps[0] + (1 - following) * x[0]) < 1e-6
    assert density.schedule.log_snr_range[1] == pytest.approx(2 * math.log((1 - least) / least), rel=1e-6)


class ExactModel(diffusers.ModelMixin):
    """The target's exact network as a diffusers model, with a learned variance that says nothing."""

    def __init__(self, kind, alpha, sigma):
        super().__init__()
        self.kind, self.alpha, self.sigma = kind, alpha, sigma

    def forward(self, sample, timestep, return_dict=True):
        alpha, sigma = self.alpha(timestep), self.sigma(timestep)
        eps, x0 = exact(sample, alpha, sigma)
        alpha, sigma = column(alpha, sample), column(sigma, sample)
        out = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[self.kind]
        return UNet2DOutput(sample=torch.cat([out, torch.full_like(out, 1e3)], 1))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DDPMScheduler", {"prediction_type": "epsilon"}),
        ("DDIMScheduler", {"prediction_type": "sample", "beta_schedule": "scaled_linear"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DDPMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_log_prob_of_an_exact_network_on_a_table(kind, config):
    scheduler = ddpm(kind, **config)
    bar = scheduler.alphas_cumprod.double()
    model = ExactModel(config["prediction_type"], lambda t: bar[t].sqrt(), lambda t: (1 - bar[t]).sqrt())
    assert_exact(from_diffusers(model, scheduler, program=False))


class ExactSD3(diffusers.SD3Transformer2DModel):
    """The target's exact velocity as a subclass of a known class, without that class's layers."""

    def __init__(self, share_of_noise=lambda t: t / 1000):
        nn.Module.__init__(self)
        self.share_of_noise = share_of_noise

    def forward(self, hidden_states, timestep):
        share = self.share_of_noise(timestep)
        eps, x0 = exact(hidden_states, 1 - share, share)
        return UNet2DOutput(sample=eps - x0)


class ExactOwn(nn.Module):
    """The target's exact velocity as a user's own network, with a time and a sign of the user's own."""

    def __init__(self, share_of_noise, sign=1):
        super().__init__()
        self.share_of_noise, self.sign = share_of_noise, sign

    def forward(self, hidden_states, timestep):
        share = self.share_of_noise(timestep)
        eps, x0 = exact(hidden_states, 1 - share, share)
        return UNet2DOutput(sample=self.sign * (eps - x0))


class ExactTuple(ExactOwn):
    """The same as people write it: another name for the time, and a tensor or a tuple as the answer."""

    def __init__(self, share_of_noise, form):
        super().__init__(share_of_noise)
        self.form = form

    def forward(self, x, t):
        return self.form(super().forward(x, t).sample)


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (ExactTuple(lambda t: t / 1000, lambda out: out), {}, {"time": "t"}),
        (ExactTuple(lambda t: t, lambda out: (out, None)), {}, {"time": "t / 1000"}),
        (ExactSD3(), {"shift": 3.0}, {}),
        (ExactOwn(lambda t: t / 1000), {}, {"time": "t"}),
        (ExactOwn(lambda t: t), {}, {"time": "t / 1000"}),
        (ExactOwn(lambda t: t), {"num_train_timesteps": 400}, {"time": "t / T"}),
        (ExactOwn(lambda t: 1 - t, -1), {}, {"time": "1 - t / T", "sign": -1}),
        # A scheduler that counts from the noise steps along data - noise by itself.
        (ExactOwn(lambda t: 1 - t / 1000, -1), {"invert_sigmas": True}, {"time": "t"}),
        (ExactOwn(lambda t: t, 1), {"invert_sigmas": True}, {"time": "1 - t / T", "sign": -1}),
    ],
    ids=["a tensor", "a tuple", "known", "t", "t/1000", "t/T", "reversed", "inverted", "twice-reversed"],
)
def test_log_prob_of_an_exact_flow(model, config, said):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    assert_exact(from_diffusers(model, scheduler, program=False, **said))


ZERO_SNR = {"DDPM": 0.0, "DDIM": 0.0, "EulerDiscrete": 2**-24, "EulerAncestralDiscrete": 2**-24}
ZERO_SNR |= {"DPMSolverMultistep": 2**-24, "UniPCMultistep": 2**-24}


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
@pytest.mark.parametrize("kind", ZERO_SNR)
def test_zero_terminal_snr_leaves_out_the_last_entry(kind, betas):
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "beta_schedule": betas}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**options)
    assert float(scheduler.alphas_cumprod[-1]) == ZERO_SNR[kind]
    schedule = from_diffusers(nn.Identity(), scheduler).schedule
    assert schedule.time_range == (0, 998)
    alpha, _ = schedule.alpha_sigma(torch.arange(999))
    assert relative(alpha, scheduler.alphas_cumprod[:-1].double().sqrt()) < 1e-12


class Own(nn.Module):
    """A network of nobody's library, which takes its time as the second argument."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.layer(x) + 1e-3 * t[:, None]


class OwnWithMore(Own):
    def forward(self, x, time=None, **cond):
        return super().forward(x, time)


@pytest.mark.parametrize("kind", [Own, OwnWithMore])
@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel, AveragedModel, partial(torch.compile, backend="eager")])
def test_a_network_of_another_origin_gets_its_time_in_second_place_however_it_is_wrapped(kind, wrap):
    own = kind()
    wrapped = own if wrap is nn.Identity else wrap(own)
    x, t = torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    assert torch.equal(from_diffusers(wrapped, ddpm()).model(x, t), own(x, t))


@pytest.mark.parametrize(
    ("model", "scheduler", "error", "message"),
    [
        (lambda x: x, None, TypeError, "model must be a diffusers model.*got function; give pipeline.unet"),
        (nn.Identity(), fs.VP(), TypeError, "scheduler must be.*got VP without config; give pipeline.scheduler"),
        (nn.Identity(), diffusers.DDPMScheduler, TypeError, "got the class DDPMScheduler and no object of it; give"),
        (diffusers.UNet2DModel, None, TypeError, "got the class UNet2DModel and no object of it; give"),
        (diffusers.DDPMPipeline(unet(), ddpm()), None, TypeError, "got DDPMPipeline; .* and pipeline.scheduler"),
        (nn.Identity(), "ScoreSdeVeScheduler", TypeError, "without alphas_cumprod; build a ScoreDensity of"),
        (nn.Identity(), ("EulerDiscreteScheduler", {"timestep_type": "continuous"}), ValueError, "continuous times"),
        (nn.Identity(), ("DDPMScheduler", {"prediction_type": "noise"}), ValueError, "one of epsilon, sample, v_pred"),
    ],
)
def test_bad_input_is_explained(model, scheduler, error, message):
    if isinstance(scheduler, str):
        scheduler = ddpm(scheduler)
    elif isinstance(scheduler, tuple):
        scheduler = ddpm(scheduler[0], **scheduler[1])
    with pytest.raises(error, match=message):
        from_diffusers(*[each for each in (model, scheduler) if each is not None])


@pytest.mark.parametrize("given", [EMAModel([nn.Parameter(torch.zeros(1))]), ddpm()], ids=["average", "scheduler"])
def test_what_is_no_time_is_explained_in_a_line(given):
    with pytest.raises(
        TypeError, match=r"^time must be one of 't', .*, got \w+; an EMAModel goes as ema=, and a pipe"
    ) as e:
        fs.from_model(unet(), ddpm(), given)
    assert len(str(e.value)) < 200  # and no configuration in it
