"""How many bits per dimension does a U-Net of diffusers need for handwritten digits?

A `UNet2DModel` is trained with a `DDPMScheduler`, by the loop of diffusers' own tutorials, on scikit-learn's digits:
8 x 8 pixels with 17 grey levels. `fastscore.adapters.from_diffusers` then reads schedule, prediction and time off
both objects, and `estimate` gives the log-density of 297 digits that the network has not seen.

Grey levels are discrete and have no density. `Levels(17)` spreads every level evenly over its own width, in training
and in the evaluation, and the bits per dimension are by the same 17 levels in [levels.low, levels.high). Zero is the
best that there is, and log2(17) = 4.09 is what a guess costs that knows nothing. The number is an upper bound:
spreading the levels and what training left undone both raise it.

Needs:   fastscore, diffusers, scikit-learn, matplotlib
Prints:  bits per dimension on held-out digits with the error of the mean, and which part of it is the estimate's own
Draws:   the digits that the network finds the most and the least probable, into the file of --out
Takes:   96 s of one processor; --small some seconds
"""

from __future__ import annotations

import argparse
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor

import fastscore as fs
from fastscore.adapters import from_diffusers

LEVELS = fs.Levels(17)
HELD_OUT = 297


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return training and held-out images: grey levels 0 .. 16, int64, shape (N, 1, 8, 8)."""
    images = torch.tensor(load_digits().images, dtype=torch.int64)[:, None]
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    return images[HELD_OUT:], images[:HELD_OUT]


def train(images: Tensor, scheduler: DDPMScheduler, steps: int, seed: int) -> UNet2DModel:
    """Return a U-Net that has learned to predict the scheduler's v: mean square, AdamW, one cycle of the rate."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = images[torch.randint(len(images), (64,))]
        x = LEVELS.dequantize(chosen, seed=step)  # another place within its level in every step
        eps, t = torch.randn_like(x), torch.randint(scheduler.config.num_train_timesteps, (len(x),))
        v_hat = unet(scheduler.add_noise(x, eps, t), t).sample
        loss = (v_hat - scheduler.get_velocity(x, eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return unet.eval()


def draw(images: Tensor, bits: Tensor, out: str) -> None:
    """Save the ten images of the fewest bits per dimension, and below them the ten of the most."""
    order = bits.argsort()
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.6), layout="constrained")
    for axis, index in zip(axes.flat, torch.cat([order[:10], order[-10:]]).tolist()):
        axis.imshow(images[index, 0].numpy(), cmap="gray_r")
        axis.set_title(f"{bits[index]:.2f}", fontsize=9)
        axis.axis("off")
    figure.suptitle("bits per dimension: the least, and the most")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, print and draw; return the bits per dimension with their two errors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="diffusers_unet.png", help="file of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer steps, fewer images")
    args = parser.parse_args(argv)
    steps, count = (60, 40) if args.small else (700, HELD_OUT)

    images, held_out = digits(args.seed)
    held_out = held_out[:count]
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    unet = train(images, scheduler, steps, args.seed)

    density = from_diffusers(unet, scheduler)
    x = LEVELS.dequantize(held_out, seed=args.seed)
    # For images, control="self" saves most of the evaluations, and needs no `fit` (docs/images.md).
    result = density.estimate(x, nfe=64, seed=args.seed, control="self")
    bits = result.bits_per_dim(LEVELS)
    per_nat = 1 / (result.dims * math.log(2))
    found = {
        "bits_per_dim": float(bits.mean()),
        "stderr": result.mean()[1] * per_nat,  # other digits would change the mean by this
        "estimate_stderr": float(result.stderr.square().sum().sqrt()) / len(x) * per_nat,  # another seed by this
    }
    print(f"{len(x)} held-out digits, {int(result.nfe[0])} evaluations each, {steps} training steps")
    print(f"bits per dimension  {found['bits_per_dim']:.3f} +- {found['stderr']:.3f}", end="")
    print(f"  (of which the estimates' own noise {found['estimate_stderr']:.4f}; a guess {math.log2(LEVELS.bins):.2f})")
    draw(held_out, bits, args.out)
    print(f"picture in {args.out}")
    return found


if __name__ == "__main__":
    main()
