"""diffusers' preconditioning schedulers and averaged weights: the library's own arithmetic, and exact networks."""

import copy
import math

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from adapters.test_diffusers import ddpm, diffusers, unet
from torch import nn

import fastscore as fs
from fastscore.adapters import from_diffusers
from fastscore.process.predictions import eps_from

EMAModel = pytest.importorskip("diffusers.training_utils").EMAModel
UNet2DOutput = pytest.importorskip("diffusers.models.unets.unet_2d").UNet2DOutput
SVD = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
KINDS = {
    "EDMEuler": ("EDMEulerScheduler", {"prediction_type": "epsilon"}),
    "EDMEuler, v": ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.3, "sigma_max": 20.0}),
    "EDMDPMSolver": ("EDMDPMSolverMultistepScheduler", {"prediction_type": "epsilon", "sigma_min": 0.01}),
    "EDMDPMSolver, v": ("EDMDPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "Euler, continuous": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", **SVD}),
}


class Recorder(nn.Module):
    """Keeps what it is called with, and answers with fixed numbers, also a learned variance."""

    def __init__(self, output):
        super().__init__()
        self.output, self.seen = output, []

    def forward(self, sample, timestep):
        self.seen.append((sample, timestep))
        return UNet2DOutput(sample=torch.cat([self.output, 1e3 + self.output], 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_and_means_what_it_does_in_the_scheduler(kind):
    """The scheduler's steps give input, time and denoised data at each of its sigmas; float32 throughout."""
    scheduler = ddpm(KINDS[kind][0], **KINDS[kind][1])
    scheduler.set_timesteps(12)
    sigma = scheduler.sigmas[:12].double()
    generator = torch.Generator().manual_seed(1)
    x, eps, output = (torch.randn(12, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    net = Recorder(output)
    density = from_diffusers(net, scheduler, program=False)
    t = density.schedule.time(-2 * sigma.log())
    alpha, spread = (column(v, x) for v in density.schedule.alpha_sigma(t))
    x_t = alpha * x + spread * eps
    answer = density.model(x_t, t)
    assert torch.equal(answer.abs()[:, :1], output.abs())
    c_f, c_x = (column(c, x) for c in eps_from("flow", density.schedule, t))
    denoised = (x_t - spread * (c_f * answer[:, :1] + c_x * x_t)) / alpha
    for i, step in enumerate(scheduler.timesteps):
        exploding = x[i : i + 1] + sigma[i] * eps[i : i + 1]
        own = copy.deepcopy(scheduler)
        assert relative(net.seen[0][0][i : i + 1], own.scale_model_input(exploding, step)) < 1e-6
        assert float(net.seen[0][1][i]) == pytest.approx(float(step), rel=1e-6, abs=1e-6)
        if hasattr(own, "precondition_outputs"):
            expected = own.precondition_outputs(exploding, output[i : i + 1], sigma[i])
        else:
            expected = own.step(output[i : i + 1].float(), step, exploding.float()).pred_original_sample
        # Denoised data are a difference of numbers of the size of sigma, which the scheduler rounds to float32.
        assert float((denoised[i] - expected[0]).abs().max()) < 1e-6 * (1 + float(sigma[i]))


class ExactInner(nn.Module):
    """The exact network inside of EDM's preconditioning, by the definition of F in Karras et al., equation 7."""

    def __init__(self, sigma_data, sign):
        super().__init__()
        self.sigma_data, self.sign = sigma_data, sign

    def forward(self, sample, timestep):
        sigma = column((4 * timestep.double()).exp(), sample.double())
        total = (sigma**2 + self.sigma_data**2).sqrt()
        x = sample.double() * total
        x0 = exact(x, torch.ones(1), sigma)[1]
        f = (x0 - self.sigma_data**2 / total**2 * x) * total / (sigma * self.sigma_data)
        return UNet2DOutput(sample=(self.sign * f).to(sample.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_of_an_exact_network(kind):
    name, config = KINDS[kind]
    scale = config.get("sigma_data", 0.5) if name.startswith("EDM") else 1.0
    model = ExactInner(scale, 1 if config["prediction_type"] == "epsilon" else -1)
    density = from_diffusers(model, ddpm(name, **config), program=False)
    assert density.schedule.data_std == scale
    noisiest, least = config.get("sigma_max", 80.0), config.get("sigma_min", 0.002)
    # Ends are times of the schedule rounded to float32: of an angle of pi / 2 - 0.001, log-SNR to 1e-4.
    assert density.log_snr_range[0] == pytest.approx(-2 * math.log(noisiest), abs=2e-4)
    assert density.log_snr_range[1] == pytest.approx(-2 * math.log(least), abs=1e-6)
    assert_exact(density)


def test_a_network_in_half_precision_is_as_good_as_half_precision():
    """The inner input is of size one at every sigma: eps is known to 1e-3, by denoised data to 1e-3 / sigma."""

    class Half(ExactInner):
        def __init__(self):
            super().__init__(0.5, 1)
            self.anchor = nn.Parameter(torch.zeros(1, dtype=torch.float16))

    nets = ExactInner(0.5, 1), Half()
    whole, half = (from_diffusers(net, ddpm("EDMEulerScheduler"), program=False) for net in nets)
    x = 0.5 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(2))
    found, expected = (each.estimate(x, nfe=256, seed=1).log_prob for each in (half, whole))
    assert float((found - expected).abs().max()) < 0.05


@pytest.mark.parametrize("schedule", [fs.EDM(0.01, 50.0, 0.7)])
def test_the_clock_is_edms(schedule):
    own = from_diffusers(
        nn.Identity(), ddpm("EDMEulerScheduler", sigma_min=0.01, sigma_max=50.0, sigma_data=0.7)
    ).schedule
    log_snr = torch.linspace(*schedule.log_snr_range, 9, dtype=torch.float64)
    assert own.log_snr_range == pytest.approx(schedule.log_snr_range)
    t = own.time(log_snr)
    assert float((own.log_snr(t) - log_snr).abs().max()) < 1e-9
    x, _, x_t = noised(own, t)
    _, _, other = noised(schedule, schedule.time(log_snr))
    assert relative(x_t * column((schedule.time(log_snr) ** 2 + 0.49).sqrt(), x), other) < 1e-12


@pytest.mark.parametrize("trained", ["all", "some"])
def test_averaged_weights_are_used_and_nothing_is_changed(trained):
    model = unet()
    if trained == "some":
        model.conv_in.requires_grad_(False)
    own = [p for p in model.parameters() if p.requires_grad]
    ema = EMAModel(own, decay=0.5)
    ema.step(own)  # the first one copies
    with torch.no_grad():
        for p in own:
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    ema.step(own)
    before = [v.clone() for v in (*model.parameters(), *ema.shadow_params)]
    density = from_diffusers(model, ddpm(), ema=ema, program=False)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        found, plain = density.model(x, t, class_labels=labels), model(x, t, class_labels=labels).sample
        ema.store(own)
        ema.copy_to(own)
        assert torch.equal(found, model(x, t, class_labels=labels).sample)
        ema.restore(own)
    assert float((found - plain).abs().max()) > 1e-3
    assert all(map(torch.equal, before, (*model.parameters(), *ema.shadow_params)))
    kept = {v.data_ptr() for v in (*model.parameters(), *ema.shadow_params)}
    assert not kept & {v.data_ptr() for v in density.model.parameters()}
    assert [p.requires_grad for p in density.model.parameters()] == [p.requires_grad for p in model.parameters()]
    ema.step(own)
    with torch.no_grad():
        assert torch.equal(found, density.model(x, t, class_labels=labels))  # those of that moment
    through = fs.from_model(torch.compile(model), ddpm(), ema=ema)
    assert type(through.model.model) is type(model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_diffusers(unet(), ddpm(), ema={}), TypeError, "ema must be an EMAModel.*got dict without shadow"),
        (
            lambda: from_diffusers(unet(), ddpm(), ema=EMAModel([nn.Parameter(torch.zeros(2))])),
            ValueError,
            r"ema must be those of UNet2DModel with \d+ parameters, .*, got averages of 1 parameters; give",
        ),
        (
            lambda: from_diffusers(nn.Linear(2, 3), ddpm(), ema=EMAModel(nn.Linear(3, 2).parameters())),
            ValueError,
            r"got averages of 2 parameters, of which \(2, 3\) stands for \(3, 2\)",
        ),
        (
            lambda: from_diffusers(nn.Identity(), ddpm("EDMEulerScheduler"), time="t"),
            ValueError,
            "time and sign must be left out with EDMEulerScheduler, which says both, got 't' and None",
        ),
        (
            lambda: from_diffusers(nn.Identity(), ddpm("EulerDiscreteScheduler", timestep_type="continuous")),
            ValueError,
            "prediction_type must be .* got 'epsilon' of EulerDiscreteScheduler",
        ),
        (
            lambda: from_diffusers(
                nn.Identity(),
                ddpm("EulerDiscreteScheduler", timestep_type="continuous", prediction_type="v_prediction"),
            ),
            ValueError,
            "the noise range must be sigma_min and sigma_max of training, got None to None",
        ),
    ],
)
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_network_of_straight_paths_is_refused():
    class Flux(diffusers.FluxTransformer2DModel):
        def __init__(self):
            nn.Module.__init__(self)

    with pytest.raises(
        ValueError, match="scheduler must be a flow-matching one for FluxTransformer2DModel, got EDMEul"
    ):
        from_diffusers(Flux(), ddpm("EDMEulerScheduler"))
