"""MONAI: its own schedulers and networks, and exact networks on their paths."""

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_monai
from fastscore.process.predictions import coefficients, eps_from

schedulers = pytest.importorskip("monai.networks.schedulers")
nets = pytest.importorskip("monai.networks.nets.diffusion_model_unet")
TABLES = {
    "DDPM": lambda: schedulers.DDPMScheduler(clip_sample=False),
    "DDPM, cosine": lambda: schedulers.DDPMScheduler(schedule="cosine", prediction_type="sample", clip_sample=False),
    "DDPM, sigmoid": lambda: schedulers.DDPMScheduler(
        schedule="sigmoid_beta", prediction_type="v_prediction", clip_sample=False
    ),
    "DDIM": lambda: schedulers.DDIMScheduler(schedule="scaled_linear_beta", clip_sample=False),
    "PNDM": lambda: schedulers.PNDMScheduler(prediction_type="v_prediction"),
}
FLOWS = {
    "discrete": lambda: schedulers.RFlowScheduler(),
    "continuous": lambda: schedulers.RFlowScheduler(num_train_timesteps=400, use_discrete_timesteps=False),
    "shifted": lambda: schedulers.RFlowScheduler(use_timestep_transform=True, sample_method="logit-normal"),
}


def unet(**options):
    torch.manual_seed(0)
    made = nets.DiffusionModelUNet(
        2, 1, 1, num_res_blocks=(1, 1), channels=(8, 16), attention_levels=(False, True), norm_num_groups=4,
        num_head_channels=8, **options,
    ).eval()  # fmt: skip
    for weight in made.parameters():  # of which those after the times and labels begin as zeros
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    return made


class Exact(nn.Module):
    """The target's exact network on a path of which alpha and sigma are known."""

    def __init__(self, kind, scales):
        super().__init__()
        self.kind, self.scales = kind, scales

    def forward(self, x, timesteps):
        alpha, sigma = self.scales(timesteps)
        eps, x0 = exact(x, alpha, sigma)
        alpha, sigma = column(alpha, x), column(sigma, x)
        answers = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": x0 - eps}
        return answers[self.kind].to(x.dtype)


def exact_on(scheduler):
    if isinstance(scheduler, schedulers.RFlowScheduler):
        return Exact("flow", lambda t: (1 - t / scheduler.num_train_timesteps, t / scheduler.num_train_timesteps))
    bar = scheduler.alphas_cumprod.double()
    return Exact(str(scheduler.prediction_type), lambda i: (bar[i].sqrt(), (1 - bar[i]).sqrt()))


def test_outputs_are_those_of_the_network():
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    context, labels = torch.randn(3, 1, 6), torch.tensor([0, 1, 2])
    model = unet(with_conditioning=True, cross_attention_dim=6, num_class_embeds=3)
    cond = {"context": context, "class_labels": labels}
    table, flow = (from_monai(model, make(), program=False) for make in (TABLES["DDPM"], FLOWS["discrete"]))
    with torch.no_grad():
        assert torch.equal(table.model(x, t, **cond), model(x, timesteps=t, **cond))
        assert torch.equal(flow.model(x, t / 1000, **cond), -model(x, timesteps=1000 * (t / 1000), **cond))
    found = table.estimate(x, nfe=8, **cond).log_prob
    other = table.estimate(x, nfe=8, context=context, class_labels=labels.flip(0)).log_prob
    assert float((found - other).abs()[[0, 2]].min()) > 1e-3


@pytest.mark.parametrize("name", TABLES)
def test_noise_and_predictions_are_those_of_the_scheduler(name):
    scheduler = TABLES[name]()
    density = from_monai(nn.Identity(), scheduler)
    t = torch.tensor([0, 1, 100, 500, 900, 990])
    x, eps, x_t = noised(density.schedule, t)
    assert relative(x_t, scheduler.add_noise(x, eps, t)) < 1e-6  # 1 - alphas_cumprod is the library's float32
    a, b, _ = (column(c, x) for c in coefficients("v", density.schedule, t))
    assert relative(a * eps + b * x, scheduler.get_velocity(x, eps, t)) < 1e-6
    if name == "PNDM":  # whose steps say nothing of one prediction
        return
    output = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, t))
    alpha, sigma = (column(v, x) for v in density.schedule.alpha_sigma(t))
    ours = (x_t - sigma * (c_f * output + c_x * x_t)) / alpha
    if name == "DDIM":
        scheduler.set_timesteps(1000)
    for i, step in enumerate(t):
        own = scheduler.step(output[i : i + 1], int(step), x_t[i : i + 1])[1]
        assert relative(ours[i], own[0]) < 1e-6


@pytest.mark.parametrize("name", FLOWS)
def test_noise_velocity_and_time_of_a_flow(name):
    scheduler = FLOWS[name]()
    steps, seen = scheduler.num_train_timesteps, []

    class Recorder(nn.Module):
        def forward(self, x, timesteps):
            seen.append(timesteps)
            return x

    density = from_monai(Recorder(), scheduler)
    t = torch.linspace(1, steps - 1, 9, dtype=torch.float64).round()
    x, eps, x_t = noised(density.schedule, t / steps)
    assert relative(x_t, scheduler.add_noise(x, eps, t)) < 1e-5  # which rounds t / T to float32
    a, b, _ = (column(c, x) for c in coefficients("flow", density.schedule, t / steps))
    assert relative(a * eps + b * x, eps - x) < 1e-9
    assert torch.equal(density.model(x_t, t / steps), -x_t)
    assert relative(seen[0], t) < 1e-12
    scheduler.set_timesteps(10, input_img_size_numel=32**3)
    step = int(t[4])
    _, own = scheduler.step((x - eps)[4:5], step, x_t[4:5])  # data - noise leads to the data
    assert relative(own, x[4:5]) < 1e-5
    least = 1 / steps if scheduler.use_discrete_timesteps else 1 / (1 + torch.tensor(8.0).exp())
    assert density.schedule.time_range[0] == pytest.approx(float(least), rel=1e-5)


@pytest.mark.parametrize("name", [*TABLES, *FLOWS])
def test_log_prob_of_an_exact_network(name):
    scheduler = (TABLES | FLOWS)[name]()
    assert_exact(from_monai(exact_on(scheduler), scheduler, program=False))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_its_own_inferer_sums_up_the_same_terms(kind):
    """Every term of `DiffusionInferer.get_likelihood` is that of the bound, by the density's own table and prediction.

    Between two normals with the posterior's variance it is (snr_(t-1) - snr_t) / 2 of the squared error of x_0.
    """
    inferers = pytest.importorskip("monai.inferers")
    scheduler = schedulers.DDPMScheduler(40, prediction_type=kind, clip_sample=False, beta_end=0.3)
    model, x = unet(), torch.rand(3, 1, 8, 8) - 0.5
    torch.manual_seed(3)
    options = {"save_intermediates": True, "verbose": False}
    _, terms = inferers.DiffusionInferer(scheduler).get_likelihood(x, model, scheduler, **options)
    torch.manual_seed(3)
    eps = torch.randn_like(x)
    density = from_monai(model, scheduler, program=False)
    snr = density.schedule.log_snr(torch.arange(40)).exp()
    for t, own in zip(scheduler.timesteps.tolist(), terms, strict=True):
        if t == 0:  # the decoder of levels
            continue
        times = torch.full((len(x),), t)
        alpha, sigma = (column(v, x) for v in density.schedule.alpha_sigma(times))
        x_t = alpha * x + sigma * eps
        with torch.no_grad():
            output = density.model(x_t, times)
        c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, times))
        error = (sigma / alpha * (eps - (c_f * output + c_x * x_t))).double()
        expected = 0.5 * (snr[t - 1] - snr[t]) * error.square()
        assert relative(own.double().flatten(1), expected.flatten(1)) < 1e-3  # differences of float32


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda: (None, None), TypeError, "model must be a MONAI network such as Diffusion.*, got NoneType; give"),
        (lambda: (nn.Identity(), None), TypeError, "scheduler must be a MONAI scheduler.*got NoneType without"),
        (lambda: (nn.Identity(), schedulers.DDPMScheduler), TypeError, "got the class DDPMScheduler and no object"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(give, error, message):
    with pytest.raises(error, match=message):
        from_monai(*give())


def test_an_unknown_prediction_is_explained():
    scheduler = schedulers.DDPMScheduler()
    scheduler.prediction_type = "noise"
    with pytest.raises(ValueError, match="prediction_type must be one of epsilon, sample, v_prediction, got 'noise'"):
        from_monai(nn.Identity(), scheduler)
