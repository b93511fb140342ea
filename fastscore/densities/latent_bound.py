r"""The density of images under a latent diffusion model: a bound, through the autoencoder.

A latent diffusion model draws latents z from a diffusion and decodes them. Its density of images is an integral over
all latents, which nobody computes; its evidence lower bound takes the latents from the encoder instead:

.. math:: \log p(x) \ge E_{z \sim q(z|x)} \big[ \log p(x|z) + \log p(z) - \log q(z|x) \big]

- q(z|x) is the encoder's Gaussian. The last term's mean is its entropy, in closed form.
- p(z) is the density of the scaled latents u = (z - shift) * factor that the network knows: log p(z) = log p(u) +
  log|det du/dz|.
- p(x|z) = N(decode(z), sigma_x^2 I). Autoencoders of latent diffusion models are trained with perceptual and
  adversarial losses, not with a sigma_x; so this is the bound of a model whose decoder is that Gaussian. It holds for
  every sigma_x. The one that makes its mean over some data largest is the root of the mean squared residual,

.. math:: \sigma_x^2 = E \|x - decode(z)\|^2 / d

Draws z_1 ... z_K each have noise of their own and a part of the evaluations. The spread of their sums is the error of
the encoder and of the diffusion together, of which Student's t with K - 1 degrees of freedom makes a bar.

References:
    Auto-Encoding Variational Bayes (Kingma and Welling, 2014), https://arxiv.org/abs/1312.6114
    Simple and Effective VAE Training with Calibrated Decoders (Rybkin et al., 2021), https://arxiv.org/abs/2006.13202
    Score-based Generative Modeling in Latent Space (Vahdat et al., 2021), https://arxiv.org/abs/2106.05931
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
    https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..estimator.protocol import Density, check_density
from ..estimator.samples import as_rows, check_batch, check_samples, refuse_not_finite
from ..ops import noise
from ..process.conditions import takes_conditions
from ..process.network import model_device, warn_if_training
from ..support.host import positive, whole
from ..support.modes import ordinary
from ..support.progress import progress_bar
from ..support.untouched import undisturbed
from .autoencoder import Rows, Scaling, check_autoencoder, decode, encode
from .bound_estimate import BoundEstimate

FEWEST = 4  # evaluations that show an error
DRAWS = 4  # leave 64 of the 256 evaluations to each, with which images have a reference of their own (docs/images.md)


class LatentBound(nn.Module):
    r"""A lower bound of log p(x) under a latent diffusion model: an autoencoder, and a density of its latents.

    It is no density that a `Density` could be, so metrics, classifiers and the ODE do not take it; they take the
    density of the latents.

    Arguments:
        density: of the scaled latents u, as the network gets them; a `ScoreDensity` (`from_diffusers(pipeline.unet,
            pipeline.scheduler)`), or a `Transformed` one.
        autoencoder: diffusers' AutoencoderKL, or a module with `encode(x).latent_dist` (`mean` and `std`, shape (B, C,
            \*latent)), `decode(z).sample` (shape of x), and a `config` with `scaling_factor`, `shift_factor`,
            `latents_mean` and `latents_std`, as far as there are any.
        decoder_std: sigma_x of p(x|z), in the units of x; by default what `fit` or `fit_decoder_std` measures. A plain
            number, no part of `state_dict()`.

    Raises:
        TypeError: if the density is none, or the autoencoder no module with encode and decode.
        ValueError: for a deterministic autoencoder (VQModel, AutoencoderTiny, AutoencoderDC), which has no such bound,
            for others of diffusers whose pipelines scale otherwise, for a density in a subspace, and a decoder_std that
            is not positive.

    Example:
        >>> density = from_diffusers(pipeline.unet, pipeline.scheduler)
        >>> bound = LatentBound(density, pipeline.vae).fit(train_images)
        >>> bound.estimate(images, nfe=1024).bits_per_dim(levels)
    """

    def __init__(self, density: Density, autoencoder: nn.Module, decoder_std: float | None = None) -> None:
        super().__init__()
        if check_density(density).subspace:
            raise ValueError(
                f"the latents of an autoencoder have densities of each entry, which {density.subspace} do not have; "
                "give a ScoreDensity of the latents"
            )
        self.density, self.autoencoder = density, check_autoencoder(autoencoder)
        self.scaling, self._rows = Scaling.of(autoencoder), Rows()
        self.decoder_std = decoder_std if decoder_std is None else positive("decoder_std", decoder_std, "units of x")
        self._given = decoder_std is not None

    @takes_conditions
    @ordinary
    @torch.no_grad()
    def estimate(
        self,
        x: Tensor,
        *,
        nfe: int | None = None,
        draws: int = DRAWS,
        seed: int = 0,
        sample_index: Tensor | None = None,
        control: str = "auto",
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> BoundEstimate:
        """Return the lower bound of log p(x), with its standard error and its terms.

        Arguments:
            x: data, floating point, shape (B, *shape), as the autoencoder gets them. Levels such as those of 8-bit
                images have no density: `Levels.dequantize` them.
            nfe: network evaluations per sample, for all draws together.
            draws: latents per sample, at least 2, each with nfe // draws evaluations. Few make the error bar wider, by
                Student's t: 6.5 times for 2, 1.6 times for 4, 1.2 times for 8.
            seed, sample_index: keys of the noise, the encoder's too, as in `ScoreDensity.estimate`.
            control, progress: as in `ScoreDensity.estimate`.
            memory: as in `ScoreDensity.estimate`, for the network, the encoder and the decoder, one after the other.
                The latents of all samples are there beside it, as the data are.
            cond, named: keyword arguments of the density's network.

        Raises:
            ValueError: as `ScoreDensity.estimate`; if decoder_std is neither given nor measured, for fewer than 2
                draws, and if the autoencoder has no Gaussian encoder, returns another shape than that of x, NaN or inf.
        """
        draws, std = whole("draws", draws), self._decoder_std()
        if draws < 2:
            raise ValueError(f"draws must be 2 at least, got {draws}; the spread of one draw shows no error")
        nfe = whole("nfe", self.density.nfe if nfe is None else nfe)
        if nfe < FEWEST * draws:
            raise ValueError(
                f"nfe must be at least {FEWEST * draws}, {FEWEST} evaluations for each of {draws} draws, got {nfe}; "
                "give more, or fewer draws"
            )
        nfe //= draws
        samples = check_samples(x, sample_index, (), self.autoencoder)
        refuse_not_finite(samples.x)
        warn_if_training(self.autoencoder)
        with undisturbed(self.autoencoder):
            mean, spread = self._rows.in_chunks("encode", self._encoded, (x, samples.index), memory, x.device)
            entropy = (spread.double().log() + 0.5 * math.log(2 * math.pi * math.e)).flatten(1).sum(1)
            errors, priors, latents = [], [], []
            with progress_bar(progress, total=draws, unit="draw", desc="bound") as bar:
                for k in range(draws):
                    draw = partial(self._drawn, seed=seed, k=k)
                    u, error = self._rows.in_chunks("decode", draw, (x, mean, spread, samples.index), memory, x.device)
                    found = self.density.estimate(
                        u,
                        nfe=nfe,
                        seed=noise.derived_seed(seed, k),
                        sample_index=samples.index,
                        control=control,
                        memory=memory,
                        progress=False,
                        cond=cond,
                    )
                    errors.append(error)
                    priors.append(found.log_prob.double() + self.scaling.log_det(u))
                    latents.append(found)
                    bar.update()
        dims = samples.x.shape[1]
        fit = -0.5 * torch.stack(errors) / std**2 - dims * (math.log(std) + 0.5 * math.log(2 * math.pi))
        return BoundEstimate.of(fit, torch.stack(priors), entropy, dims, std, tuple(latents))

    @takes_conditions
    @ordinary
    @torch.no_grad()
    def fit(
        self,
        data: Tensor,
        *,
        reference: str = "auto",
        evaluations: int = 400_000,
        seed: int = 0,
        memory: int | str | None = None,
        progress: bool | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> LatentBound:
        """Fit the density to latents of data, measure decoder_std unless the bound was made with one, and return self.

        Arguments:
            data: training data, shape (N, *shape), N >= 20. All of them are encoded: some thousands do.
            reference, evaluations, seed, memory, progress, cond, named: as in `ScoreDensity.fit`.

        Raises:
            ValueError: as `ScoreDensity.fit`, and as `estimate`.
        """
        u, std = self._latents_of(data, seed, memory, measured=not self._given)
        self.density.fit(
            u, reference=reference, evaluations=evaluations, seed=seed, memory=memory, progress=progress, cond=cond
        )
        self.decoder_std = std
        return self

    @ordinary
    @torch.no_grad()
    def fit_decoder_std(self, data: Tensor, *, seed: int = 0, memory: int | str | None = None) -> LatentBound:
        """Measure decoder_std on data, and leave the density as it is; return self.

        It is the root mean square of x - decode(z), with one z of q(z|x) for each sample.

        Arguments:
            data: shape (N, *shape).
            seed, memory: as in `estimate`.

        Raises:
            ValueError: as `estimate`, and if the residuals are zero.
        """
        self.decoder_std = self._latents_of(data, seed, memory, measured=True)[1]
        return self

    def _decoder_std(self) -> float:
        if self.decoder_std is None:
            raise ValueError(
                "decoder_std, the standard deviation of p(x|z), is not known, since autoencoders are not trained with "
                "one; give LatentBound(..., decoder_std=) in the units of x, or measure it with fit or fit_decoder_std"
            )
        return self.decoder_std

    def _latents_of(
        self, data: Tensor, seed: int, memory: int | str | None, measured: bool
    ) -> tuple[Tensor, float | None]:
        """Return scaled latents of data, drawn once each, where the data are, and decoder_std, measured if asked."""
        check_batch(data)
        refuse_not_finite(as_rows(data))

        def there_and_back(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            u, error = self._drawn(x, *encode(self.autoencoder, x, index), index, seed, 0, measured)
            return u, error

        device, index = model_device(self.autoencoder, data.device), torch.arange(len(data), device="cpu")
        warn_if_training(self.autoencoder)
        with undisturbed(self.autoencoder):
            u, error = self._rows.in_chunks("there and back", there_and_back, (data, index), memory, device)
        if not measured:
            return u, self.decoder_std
        rms = math.sqrt(float(error.mean()) / data[0].numel())
        return u, positive("the root mean square of x - decode(z)", rms, "units of x")

    def _encoded(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return encode(self.autoencoder, x, index)

    def _drawn(
        self, x: Tensor, mean: Tensor, std: Tensor, index: Tensor, seed: int, k: int, decoded: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return scaled latents of draw k, keyed by seed and sample, and the squared residuals of x if asked."""
        words = noise.words(seed, index.to(x.device), k, noise.STREAM_ENCODER, mean[0].numel())
        z = mean + std * noise.normal(words, dtype=mean.dtype).reshape(mean.shape)
        error = decode(self.autoencoder, z, x, index) if decoded else x.new_zeros(len(x), dtype=torch.float64)
        return self.scaling.to_network(z), error
