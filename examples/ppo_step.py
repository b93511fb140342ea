"""Can a diffusion policy be improved by PPO, with the log-probability of its actions from fastscore?

PPO needs the ratio pi_new(a | s) / pi_old(a | s) of every action that was taken. A diffusion policy has no such
number by itself; `density.log_prob(a, state=s)` gives one, with a gradient. Two things make the ratio usable:

- common random numbers: the same `seed` before and after a step gives both the same noise levels and the same noise,
  so that the ratio is exactly 1 while the weights are, and what differs afterwards is the policy;
- a fresh seed in every round, so that the policy does not learn to please one draw of the noise.

The task is a bandit with a state. An action in the plane pays exp(-|a - goal(s)|^2 / 0.2), at most 1. The policy
begins as a wide Gaussian around the origin, learned from samples, and pays 0.1 or so.

Needs:   fastscore, matplotlib
Prints:  the mean reward with its error and the ratio before any step (1) and after the last, every few rounds
Draws:   the reward over the rounds, into the file of --out
Takes:   34 s of one processor; --small some seconds
"""

from __future__ import annotations

import argparse
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fastscore as fs

SCHEDULE = fs.LogSNR(-7.0, 7.0)
CLIP = 0.2
NFE = 16


class Policy(nn.Module):
    """An MLP that denoises an action, given the log-SNR and the state (an angle)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("frequency", 2.0 ** torch.arange(-3, 2))
        first, second = (nn.Linear(14, width), nn.SiLU()), (nn.Linear(width, width), nn.SiLU())
        self.net = nn.Sequential(*first, *second, nn.Linear(width, 2))

    def forward(self, a_t: Tensor, log_snr: Tensor, state: Tensor) -> Tensor:
        angle = log_snr[:, None] * self.frequency
        where = torch.stack([state.cos(), state.sin()], 1)
        return self.net(torch.cat([a_t, where, angle.sin(), angle.cos()], 1))


def reward(state: Tensor, action: Tensor) -> Tensor:
    """Return what actions pay, shape (B,): the goal is on the unit circle, at the angle of the state."""
    goal = torch.stack([state.cos(), state.sin()], 1)
    return (-(action - goal).square().sum(1) / 0.2).exp()


@torch.no_grad()
def act(policy: Policy, state: Tensor, steps: int = 20) -> Tensor:
    """Return an action for each state by ancestral sampling (Ho et al., 2020), from noise to data in log-SNR."""
    log_snr = torch.linspace(*SCHEDULE.log_snr_range, steps + 1)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    a_t = torch.randn(len(state), 2)
    for now in range(steps):
        v = policy(a_t, log_snr[now].expand(len(state)), state)
        a_0 = alpha[now] * a_t - sigma[now] * v
        # q(a_s | a_t, a_0): the mean pulls to a_0 by the share of the noise that goes, exp(log_snr_t - log_snr_s).
        kept = (log_snr[now] - log_snr[now + 1]).exp()
        mean = alpha[now + 1] * (1 - kept) * a_0 + kept * alpha[now + 1] / alpha[now] * a_t
        a_t = mean + sigma[now + 1] * (1 - kept).sqrt() * torch.randn_like(a_t)
    return a_0


def clone(density: fs.ScoreDensity, steps: int) -> None:
    """Teach the policy a wide Gaussian around the origin, whatever the state, by maximum likelihood."""
    optimizer = torch.optim.Adam(density.parameters(), 2e-3)
    for step in range(steps):
        action, state = 0.7 * torch.randn(256, 2), 2 * math.pi * torch.rand(256)
        loss = fs.density_loss(density, action, seed=step, state=state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ppo_round(
    density: fs.ScoreDensity, optimizer: torch.optim.Optimizer, batch: int, epochs: int, seed: int
) -> dict[str, float]:
    """Act, be paid, and take `epochs` steps on the clipped objective; return rewards and ratios."""
    state = 2 * math.pi * torch.rand(batch)
    action = act(density.model, state)
    paid = reward(state, action)
    advantage = (paid - paid.mean()) / (paid.std() + 1e-6)
    with torch.no_grad():
        old = density.log_prob(action, nfe=NFE, seed=seed, state=state)
    ratios = []
    for _ in range(epochs):
        ratio = (density.log_prob(action, nfe=NFE, seed=seed, state=state) - old).exp()
        ratios.append(ratio.detach())
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(density.parameters(), 1.0)
        optimizer.step()
    first, last = ratios[0], ratios[-1]
    spread = {"first_ratio_off": float((first - 1).abs().max()), "last_ratio_std": float(last.std())}
    return {"reward": float(paid.mean()), "stderr": float(paid.std()) / math.sqrt(batch)} | spread


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Clone, improve, print and draw; return what each round paid and its ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="ppo_step.png", help="file of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer rounds and actions")
    args = parser.parse_args(argv)
    steps, rounds, batch, epochs = (200, 10, 200, 5) if args.small else (1000, 40, 500, 8)

    torch.manual_seed(args.seed)
    density = fs.ScoreDensity(Policy(), SCHEDULE, predicts="v")
    clone(density, steps)
    optimizer = torch.optim.Adam(density.parameters(), 1e-3)
    history = []
    for number in range(rounds):
        history.append(ppo_round(density, optimizer, batch, epochs, seed=args.seed * rounds + number))
        if number % max(1, rounds // 6) == 0 or number == rounds - 1:
            print(
                "round {:3}  reward {reward:.3f} +- {stderr:.3f}  ratio 1 to {first_ratio_off:.0e} before the first "
                "step, spread {last_ratio_std:.2f} at the last".format(number, **history[-1])
            )

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    paid, error = ([each[name] for each in history] for name in ("reward", "stderr"))
    axis.errorbar(range(rounds), paid, [1.96 * each for each in error], capsize=2)
    axis.set(xlabel="round", ylabel="mean reward, ±1.96 standard errors")
    figure.savefig(args.out, dpi=120)
    plt.close(figure)
    print(f"picture in {args.out}")
    return history


if __name__ == "__main__":
    main()
