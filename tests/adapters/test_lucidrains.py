"""denoising-diffusion-pytorch: its own GaussianDiffusion and Unet, and exact networks in them."""

import math

import pytest
import torch
from adapters.bare import load
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_lucidrains
from fastscore.process.predictions import coefficients, eps_from

library, guidance = load("denoising_diffusion_pytorch", "denoising_diffusion_pytorch", "classifier_free_guidance")
OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
SCHEDULES = ("linear", "cosine", "sigmoid")


class Exact(nn.Module):
    """The target's exact network with the attributes that GaussianDiffusion asks for."""

    channels = out_dim = 1
    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x, t, x_self_cond=None):
        ratio = self.ratio[t]  # sigma / alpha
        alpha = 1 / (1 + ratio**2).sqrt()
        sigma = ratio * alpha
        eps, x0 = exact(x, alpha, sigma)
        return {"pred_noise": eps, "pred_x0": x0, "pred_v": column(alpha, x) * eps - column(sigma, x) * x0}[
            self.objective
        ]


def diffusion(model, **options):
    made = library.GaussianDiffusion(model, image_size=2, timesteps=500, **options)
    model.ratio = made.sqrt_recipm1_alphas_cumprod.double()
    return made


def test_outputs_are_those_of_the_network():
    torch.manual_seed(0)
    net = library.Unet(8, dim_mults=(1, 2), channels=1, flash_attn=False).eval()
    made = library.GaussianDiffusion(net, image_size=8, timesteps=100)
    density = from_lucidrains(made, program=False)
    x, t = torch.rand(3, 1, 8, 8), torch.tensor([0, 50, 99])
    with torch.no_grad():
        assert torch.equal(density.density.model(x, t), made.model(x, t))
        assert torch.equal(density.to_network(x)[0], made.normalize(x))
        assert bool(torch.isfinite(density.estimate(x, nfe=4).log_prob).all())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
def test_noise_and_predictions_are_those_of_the_library(beta_schedule, objective):
    made = diffusion(Exact(objective), beta_schedule=beta_schedule, objective=objective)
    density = from_lucidrains(made).density
    assert density.predicts == OBJECTIVES[objective]
    t = torch.tensor([0, 1, 50, 200, 400, 498])
    x, eps, x_t = noised(density.schedule, t)
    assert relative(x_t, made.q_sample(x, t, noise=eps)) < 1e-6
    c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, t))
    eps_hat = c_f * density.model(x_t, t) + c_x * x_t
    own = made.model_predictions(x_t, t)
    if objective == "pred_noise":
        assert relative(eps_hat, own.pred_noise) < 1e-12
    # The library subtracts two float32 numbers of 1e4 at the noisy end, and divides their difference of noise.
    clean = slice(1, 4)
    alpha, sigma = (column(v, x) for v in density.schedule.alpha_sigma(t))
    x0_hat = (x_t - sigma * eps_hat) / alpha
    assert relative(x0_hat[clean], own.pred_x_start[clean]) < 1e-6
    if objective == "pred_v":
        a, b, _ = (column(c, x) for c in coefficients("v", density.schedule, t))
        assert relative(a * eps + b * x, made.predict_v(x, t, eps)) < 1e-6


@pytest.mark.parametrize("auto_normalize", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_log_prob_of_an_exact_network(objective, auto_normalize):
    made = diffusion(Exact(objective), objective=objective, auto_normalize=auto_normalize, beta_schedule="linear")
    density = from_lucidrains(made, program=False)
    # log p of images in [0, 1] is that of 2 x - 1 plus log 2 a dimension.
    assert_exact(density, to_user=made.unnormalize, log_det=-4 * math.log(2) if auto_normalize else 0.0, rounding=1e-5)


class ExactGuided(Exact):
    """The target moved by its class, in a network that drops labels by itself, as the library's does in eval mode."""

    cond_drop_prob = 0.5

    def forward(self, x, t, classes, cond_drop_prob=None):
        drop = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        kept = torch.rand(len(x)) >= drop
        shift = column(torch.where(kept, classes.double(), torch.zeros(len(x), dtype=torch.float64)), x)
        return super().forward(x - shift / column((1 + self.ratio[t] ** 2).sqrt(), x), t)


def guided(model=None):
    if model is None:
        torch.manual_seed(0)
        model = guidance.Unet(8, num_classes=3, dim_mults=(1,), channels=1)
        return guidance.GaussianDiffusion(model, image_size=8, timesteps=100)
    made = guidance.GaussianDiffusion(model, image_size=2, timesteps=500, beta_schedule="linear")
    model.ratio = made.sqrt_recipm1_alphas_cumprod.double()
    return made


def test_a_guided_network_is_called_with_its_labels_and_without_guidance():
    made = guided()
    for parameter in made.model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.eval()
    density = from_lucidrains(made, program=False)
    x, t, classes = torch.rand(3, 1, 8, 8), torch.tensor([0, 50, 99]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        own = made.model.forward_with_cond_scale(x, t, classes, cond_scale=1.0)
        assert torch.equal(density.density.model(x, t, classes=classes), own)
        null = made.model(x, t, classes, cond_drop_prob=1.0)
        assert torch.equal(density.density.model(x, t, classes=classes, cond_drop_prob=1.0), null)
        assert float((own - null).abs().max()) > 1e-3
        # The library's forward drops half of the labels; the density is the same at every call.
        first, second = (density.estimate(x, nfe=8, classes=classes).log_prob for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(density.to_network(x)[0], guidance.normalize_to_neg_one_to_one(x))


def test_log_prob_of_an_exact_guided_network():
    model = ExactGuided("pred_noise")
    density = from_lucidrains(guided(model), program=False)
    # Class 1 is the target plus one; log p of images in [0, 1] is that of 2 x - 1 plus log 2 a dimension.
    units = {"to_user": lambda z: (z + 2) / 2, "log_det": -4 * math.log(2), "shift": 1.0, "rounding": 1e-5}
    assert_exact(density, **units, count=16, classes=torch.ones(16, dtype=torch.long))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (library, {"immiscible": True}, "immiscible must be False.*got True"),
        (library, {"offset_noise_strength": 0.1}, "offset_noise_strength must be 0.*got 0.1"),
        (guidance, {"offset_noise_strength": 0.1}, "offset_noise_strength must be 0.*got 0.1"),
    ],
)
def test_noise_that_is_not_independent_is_refused(module, options, message):
    made = module.GaussianDiffusion(Exact("pred_noise"), image_size=2, timesteps=100, **options)
    with pytest.raises(ValueError, match=message):
        from_lucidrains(made)


def test_bad_input_is_explained():
    with pytest.raises(
        TypeError, match="must be a GaussianDiffusion of denoising-diffusion-pytorch, got Linear without"
    ):
        from_lucidrains(nn.Linear(2, 2))
    made = diffusion(Exact("pred_v"))
    made.normalize = lambda x: 10 * x
    with pytest.raises(
        ValueError, match=r"normalize must be the identity or x \* 2 - 1, got \[0, 1\] to \[0.0, 10.0\]"
    ):
        from_lucidrains(made)
    made.objective = "pred_score"
    with pytest.raises(ValueError, match="objective must be one of pred_noise, pred_x0, pred_v, got 'pred_score'"):
        from_lucidrains(made)
