"""The likelihood of score_sde, which is no package: its VP process and Hutchinson's trace, solved by torchdiffeq."""

import torch
from race_targets import Exact
from torchdiffeq import odeint

import fastscore as fs

from . import PROBE_TOLERANCE, PROBES, Method, counted, normal_log_prob

CLEAN = 1e-5  # where score_sde's likelihood starts
FIXED = tuple((steps, probes) for steps, probes in ((8, 1), (16, 4), (32, 16), (64, 64), (128, 256)))


def methods(problem):
    if problem.target is None:
        return []
    schedule = fs.VP()
    network = Exact(problem.target, schedule, "score")

    def log_prob(x, probes, seed, **solver):
        signs = torch.randint(2, (probes * len(x), x.shape[1]), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1

        def field(t, state):
            beta = schedule.beta_min + t * (schedule.beta_max - schedule.beta_min)
            with torch.enable_grad():
                u = state[0].detach().requires_grad_()
                drift = -0.5 * beta * (u + network(u, t.clamp(CLEAN, 1).expand(len(u))))
                (grad,) = torch.autograd.grad(drift, u, signs)
            return drift.detach(), (grad * signs).sum(1)

        start = x.repeat(probes, 1), torch.zeros(probes * len(x))
        ends = solver.pop("times", torch.tensor([CLEAN, 1.0]))
        u, divergence = (part[-1] for part in odeint(field, start, ends, **solver))
        return (normal_log_prob(u) + divergence).reshape(probes, -1).mean(0)

    def adaptive(x, probes, seed):
        options = {"method": "dopri5", "rtol": PROBE_TOLERANCE, "atol": PROBE_TOLERANCE}
        return counted(network, x, lambda: log_prob(x, probes, seed, **options))

    def fixed(x, effort, seed):
        steps, probes = effort
        times = torch.linspace(CLEAN**0.5, 1, steps + 1) ** 2
        return counted(network, x, lambda: log_prob(x, probes, seed, method="rk4", times=times))

    return [
        Method("score_sde dopri5, Hutchinson", adaptive, PROBES),
        Method("score_sde rk4, Hutchinson", fixed, FIXED),
    ]
