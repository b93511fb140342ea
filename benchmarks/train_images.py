"""Train the networks of `image_networks.py`; the weights in this folder are what it wrote.

python benchmarks/train_images.py unet 16 --steps 4000
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import torch
from image_networks import KINDS, PREDICTS, SCHEDULE, SIZES, ImageNetwork, save
from photographs import HELD_OUT, TRAINING, dequantized, patches
from torch import Tensor

import fastscore as fs

PATCHES, BATCH, RATE, DECAY = 40_000, 64, 2e-3, 0.999
HELD_OUT_COUNT, NFE = 256, 64


def train(kind: str, size: int, steps: int) -> ImageNetwork:
    """Return the average of the weights of a training by the plain loss of the noise, log-SNR uniform, seed 0."""
    torch.manual_seed(0)
    levels, _ = patches(size, TRAINING, PATCHES)
    network = ImageNetwork(kind, size)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), RATE, betas=(0.9, 0.99))
    generator, seen, start = torch.Generator().manual_seed(0), 0.0, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 200) * 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-6
        x = dequantized(levels[torch.randint(len(levels), (BATCH,), generator=generator)], generator)
        loss = eps_loss(network, x if step % 2 else x.flip(-1), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for kept, now in zip(average.parameters(), network.parameters()):
                kept.lerp_(now, 1 - min(DECAY, step / (step + 10)))
        seen += (float(loss) - seen) * max(0.01, 1 / (step + 1))
        if step % 200 == 199:
            print(f"{kind} {size}, step {step + 1}: loss {seen:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return average.eval().requires_grad_(False)


def eps_loss(network: ImageNetwork, x: Tensor, generator: torch.Generator) -> Tensor:
    u = (torch.randperm(len(x), generator=generator) + torch.rand((), generator=generator)) / len(x)
    log_snr = SCHEDULE.lo + (SCHEDULE.hi - SCHEDULE.lo) * u
    alpha, sigma = (v.to(x)[:, None, None, None] for v in SCHEDULE.scale(log_snr))
    eps = torch.randn(x.shape, generator=generator)
    x_t = alpha * x + sigma * eps
    with torch.autocast("cpu", torch.bfloat16):
        v = network(x_t, log_snr)
    return (eps - alpha * v.float() - sigma * x_t).square().mean()


def held_out(network: ImageNetwork, size: int) -> str:
    """Return the bits per dimension of held-out patches, with their standard error."""
    x = dequantized(patches(size, HELD_OUT, HELD_OUT_COUNT)[0], torch.Generator().manual_seed(0))
    density = fs.ScoreDensity(network, SCHEDULE, PREDICTS)
    bits = density.estimate(x, nfe=NFE, progress=False).bits_per_dim(bins=256, low=-1, high=1)
    return f"{float(bits.mean()):.3f} +- {float(bits.std()) / len(bits) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("size", type=int, choices=sorted({size for sizes in SIZES.values() for size in sizes}))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = train(options.kind, options.size, options.steps)
    told = {
        "trained": f"{options.steps} steps of {BATCH} patches of {', '.join(TRAINING)}",
        "held-out bits per dimension": held_out(network, options.size),
    }
    save(network, options.kind, options.size, told)
    print(told)


if __name__ == "__main__":
    main()
