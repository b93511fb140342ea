"""zuko: FreeFormJacobianTransform over the exact velocity, trace exact or by one random vector a sample."""

import torch
from race_targets import Exact

import fastscore as fs

from . import PROBE_TOLERANCE, PROBES, TOLERANCES, Method, counted, normal_log_prob


def methods(problem):
    if problem.target is None:
        return []
    from zuko.transforms import FreeFormJacobianTransform

    schedule = fs.FlowMatching(data_at=0)
    network = Exact(problem.target, schedule, "flow")

    def field(t, x):
        return network(x, t.clamp(*schedule.time_range).expand(len(x)))

    def log_prob(x, tolerance, exact):
        ends = torch.tensor(0.0), torch.tensor(1.0)
        transform = FreeFormJacobianTransform(field, *ends, atol=tolerance, rtol=tolerance, exact=exact)
        with torch.no_grad():
            noise, ladj = transform.call_and_ladj(x)
        return normal_log_prob(noise) + ladj

    def exact(x, tolerance, seed):
        return counted(network, x, lambda: log_prob(x, tolerance, True), vectors=x.shape[1])

    def hutchinson(x, probes, seed):
        torch.manual_seed(seed)
        many = x.repeat(probes, 1)
        return counted(network, x, lambda: log_prob(many, PROBE_TOLERANCE, False).reshape(probes, -1).mean(0))

    return [
        Method("zuko, exact trace", exact, TOLERANCES, random=False),
        Method("zuko, Hutchinson", hutchinson, PROBES),
    ]
