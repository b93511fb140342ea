"""How good, and how fast, is the log-posterior of an sbi network, where the true posterior is known?

The simulator is linear and Gaussian: x = A theta + noise, theta ~ N(0, 1). Its posterior p(theta | x) is a Gaussian
in closed form. sbi trains a network on simulations (NPSE, a score network, or FMPE, a flow), and
`fastscore.adapters.from_sbi` returns the density of that network. Beside it stands sbi's own `posterior.log_prob`,
which solves an ODE.

Two errors are told apart. The standard error is that of the estimate, and more evaluations lower it. The distance
from the truth is mostly the network's, and more training lowers it. Read the first without the second and you will
trust too much. For --method fmpe the ODE is the nearer one: a flow's loss leaves the bound low at the clean end.

Needs:   fastscore, sbi, matplotlib
Prints:  root-mean-square and mean distance from the true log-posterior, and the processor's time, of `estimate` and
         of sbi's ODE; what `fit` takes before; sbi leaves a log of its training in sbi-logs/ of the current folder
Draws:   the log-posteriors with error bars against the truth, into the file of --out
Takes:   53 s of one processor; --small some seconds
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sbi.inference import FMPE, NPSE
from torch import Tensor
from torch.distributions import MultivariateNormal

from fastscore.adapters import from_sbi

NOISE = 0.5
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.5, 0.0, 1.0], [0.3, -0.3, 0.3]])
PRIOR = MultivariateNormal(torch.zeros(3), torch.eye(3))


def simulate(theta: Tensor) -> Tensor:
    """Return one simulation for each row of theta, shape (N, 4)."""
    return theta @ A.T + NOISE * torch.randn(len(theta), len(A))


def true_posterior(x: Tensor) -> MultivariateNormal:
    """Return p(theta | x): precision I + A'A / noise^2, mean that times A'x / noise^2."""
    precision = torch.eye(3) + A.T @ A / NOISE**2
    return MultivariateNormal(torch.linalg.solve(precision, A.T @ x / NOISE**2), precision_matrix=precision)


def timed(call: Callable) -> tuple[object, float]:
    """Return what a call returns, and how long the processor is at it, s."""
    start = time.process_time()
    return call(), time.process_time() - start


def draw(truth: Tensor, columns: dict[str, tuple[Tensor, Tensor | None]], out: str) -> None:
    """Save a scatter of log-posteriors against the truth, with bars of 1.96 standard errors."""
    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    for name, (found, stderr) in columns.items():
        axis.errorbar(truth, found, None if stderr is None else 1.96 * stderr, fmt=".", label=name, alpha=0.6)
    ends = [float(truth.min()), float(truth.max())]
    axis.plot(ends, ends, "k", linewidth=0.8)
    axis.set_xlabel("true log p(θ | x), nats")
    axis.set_ylabel("found, nats")
    axis.legend()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, print and draw; return distances from the truth, nats, and times of the processor, s."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=["npse", "fmpe"], default="npse", help="the kind of network")
    parser.add_argument("--out", default="sbi_posterior.png", help="file of the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few seconds: fewer simulations, epochs and points")
    args = parser.parse_args(argv)
    simulations, epochs, count = (3000, 20, 50) if args.small else (10_000, 60, 200)

    torch.manual_seed(args.seed)
    theta = PRIOR.sample((simulations,))
    options = {"prior": PRIOR, "show_progress_bars": False}
    inference = NPSE(sde_type="vp", **options) if args.method == "npse" else FMPE(**options)
    inference.append_simulations(theta, simulate(theta))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Maximum number of epochs")  # which is what was asked for
        estimator = inference.train(max_num_epochs=epochs, stop_after_epochs=epochs, learning_rate=2e-3)
    posterior = inference.build_posterior()

    x_o = simulate(torch.tensor([[0.5, -1.0, 0.8]]))
    exact = true_posterior(x_o[0])
    points = exact.sample((count,))
    truth = exact.log_prob(points)

    density = from_sbi(estimator, x_o)
    # The posterior's own samples tell `fit` where it lies: of all later estimates the errors are smaller.
    own_samples, sampling = timed(lambda: posterior.sample((500,), x=x_o, show_progress_bars=False))
    _, fitting = timed(lambda: density.fit(own_samples, evaluations=100_000, progress=False))
    result, seconds = timed(lambda: density.estimate(points, nfe=256, seed=args.seed))
    ode, ode_seconds = timed(lambda: posterior.log_prob(points, x=x_o))

    found = {
        "fit_seconds": sampling + fitting,
        "seconds": seconds,
        "ode_seconds": ode_seconds,
        "stderr": float(result.stderr.mean()),
    }
    print(f"{args.method.upper()}, {simulations} simulations, {count} points of the true posterior, nats")
    for name, values, spent in (("", result.log_prob, seconds), ("ode_", ode, ode_seconds)):
        off = values - truth
        found |= {f"{name}rms": float(off.square().mean().sqrt()), f"{name}bias": float(off.mean())}
        found[f"{name}bias_stderr"] = float(off.std()) / math.sqrt(count)
        label = "sbi's ODE" if name else "fastscore"
        print(f"{label}  off by {found[name + 'rms']:.3f} (root mean square), ", end="")
        print(f"on average {found[name + 'bias']:+.3f} +- {found[name + 'bias_stderr']:.3f}, {spent:.3f} s")
    print(f"fastscore's standard error {found['stderr']:.3f}: what is beyond it is the network's own distance")
    print(f"before the first estimate: samples {sampling:.2f} s, fit {fitting:.2f} s")
    draw(truth, {"fastscore, ±1.96 stderr": (result.log_prob, result.stderr), "sbi's ODE": (ode, None)}, args.out)
    print(f"picture in {args.out}")
    return found


if __name__ == "__main__":
    main()
