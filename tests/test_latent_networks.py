"""The bound of latent diffusion models with networks of diffusers, against its definition on the same draws."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from linear_autoencoder import Case, draw, normal
from torch.distributions import Normal

import fastscore as fs
from fastscore.adapters import from_diffusers
from fastscore.ops import noise

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**config):
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "in_channels": 1}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    both = {"down_block_types": down, "up_block_types": up, "out_channels": 1} | blocks
    return diffusers.AutoencoderKL(**both, **config).eval()


@pytest.mark.parametrize("config", [{}, {"scaling_factor": 1.3, "shift_factor": 0.2}])
def test_an_autoencoder_of_diffusers_is_its_definition(config):
    vae = tiny(**config)
    sizes = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(
        sample_size=4, in_channels=2, out_channels=2, layers_per_block=1, norm_num_groups=4, num_class_embeds=3, **sizes
    ).eval()
    density = from_diffusers(unet, diffusers.DDPMScheduler(), program=False)
    x = normal(5, 1, 8, 8, seed=4).float()
    labels, index = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([7, 3, 900, 4, 5])
    made = fs.LatentBound(density, vae, 0.4)
    found = made.estimate(x, nfe=60, draws=3, seed=9, sample_index=index, class_labels=labels)
    with torch.no_grad():
        q, values = vae.encode(x).latent_dist, []
        factor, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor", 0.0)
        entropy = Normal(q.mean, q.std).entropy().flatten(1).sum(1)
        for k in range(3):
            z = draw(q, index, 9, k)
            u = (z - shift) * factor
            prior = density.estimate(
                u, nfe=20, seed=noise.derived_seed(9, k), sample_index=index, class_labels=labels
            ).log_prob + z[0].numel() * math.log(factor)
            fit = Normal(vae.decode(z).sample, 0.4).log_prob(x).flatten(1).sum(1)
            values.append(fit + prior + entropy)
    expected = torch.stack(values)
    # Sums of 64 and 32 numbers in float32 around hundreds of nats, in batches of another size.
    assert torch.allclose(found.log_prob, expected.mean(0), rtol=1e-5)
    assert torch.allclose(found.variance.float(), expected.var(0) / 3, rtol=1e-3)
    assert found.log_prob.dtype == torch.float32
    other = made.estimate(x, nfe=60, draws=3, seed=9, sample_index=index, class_labels=(labels + 1) % 3)
    assert bool(((other.log_prob - found.log_prob).abs() > 1e-4).all())


def test_a_residual_of_diffusers_is_measured_on_data_as_it_is():
    vae, data = tiny(), normal(40, 1, 8, 8, seed=4).float()
    made = fs.LatentBound(Case().density, vae).fit_decoder_std(data, seed=4)
    with torch.no_grad():
        residual = vae.decode(draw(vae.encode(data).latent_dist, torch.arange(40), 4, 0)).sample - data
    # Rounding of float32.
    assert made.decoder_std == pytest.approx(float(residual.square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("AutoencoderTiny", {}, "got AutoencoderTiny, which gives each x one latent"),
        ("VQModel", {}, "got VQModel, which gives each x one latent"),
        ("AutoencoderDC", {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                           "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1),
                           "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
                           "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
                           "latent_channels": 4},
         "got AutoencoderDC, which gives each x one latent"),
        ("AutoencoderKLTemporalDecoder", {"block_out_channels": (32,)},
         "must be an AutoencoderKL.*got AutoencoderKLTemporalDecoder; put a module around it"),
    ],
)  # fmt: skip
def test_other_autoencoders_of_diffusers_are_refused(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fs.LatentBound(Case().density, getattr(diffusers, name)(**options))


def test_the_page_runs_with_networks_of_diffusers():
    sizes = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        cross_attention_dim=6, attention_head_dim=4, **sizes,
    ).eval()  # fmt: skip
    pipeline = SimpleNamespace(vae=tiny(), unet=unet, scheduler=diffusers.DDPMScheduler())
    page = (Path(__file__).parent.parent / "docs" / "latents.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    code = code.replace(".fit(train_images,", ".fit(train_images, evaluations=200,").replace("nfe=1024", "nfe=64")
    levels, k = fs.Levels(256), (normal(20, 1, 8, 8, seed=8) * 40 + 128).clamp(0, 255).long()
    text = normal(1, 3, 6, seed=9).float()
    names = {"pipeline": pipeline, "levels": levels, "train_images": levels.values(k), "test_images": k[:4]}
    exec(code, names | {"train_text": text.expand(20, 3, 6), "test_text": text.expand(4, 3, 6)}, found := {})
    assert found["bound"].decoder_std > 0
    assert found["found"].nfe.tolist() == [64] * 4
    assert bool(torch.isfinite(found["found"].log_prob).all())
