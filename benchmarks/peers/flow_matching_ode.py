"""flow_matching (CC-BY-NC: compared with, never depended on): ODESolver.compute_likelihood on the exact velocity."""

import torch
from race_targets import Exact

import fastscore as fs

from . import PROBE_TOLERANCE, PROBES, STEPS, TOLERANCES, Method, counted, normal_log_prob


def methods(problem):
    if problem.target is None:
        return []
    from flow_matching.solver import ODESolver

    schedule = fs.FlowMatching(data_at=1)
    network = Exact(problem.target, schedule, "flow")
    ends = schedule.time_range[::-1]
    solver = ODESolver(velocity_model=lambda x, t: network(x, t.expand(len(x)).clamp(*ends)))

    def likelihood(x, **options):
        return solver.compute_likelihood(x_1=x, log_p0=normal_log_prob, **options)[1]

    def dopri5(x, tolerance, exact):
        return likelihood(x, step_size=None, method="dopri5", exact_divergence=exact, atol=tolerance, rtol=tolerance)

    def adaptive(x, tolerance, seed):
        return counted(network, x, lambda: dopri5(x, tolerance, True))

    def midpoint(x, steps, seed):
        run = {"step_size": 1 / steps, "method": "midpoint", "exact_divergence": True}
        return counted(network, x, lambda: likelihood(x, **run))

    def hutchinson(x, probes, seed):
        torch.manual_seed(seed)
        many = x.repeat(probes, 1)  # it has one probe a sample; so the batch is repeated
        return counted(network, x, lambda: dopri5(many, PROBE_TOLERANCE, False).reshape(probes, -1).mean(0))

    return [
        Method("flow_matching dopri5, exact trace", adaptive, TOLERANCES, random=False),
        Method("flow_matching midpoint, exact trace", midpoint, STEPS, random=False),
        Method("flow_matching dopri5, Hutchinson", hutchinson, PROBES),
    ]
