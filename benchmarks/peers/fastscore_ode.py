"""fastscore's own probability-flow ODE."""

import fastscore as fs

from . import PROBE_TOLERANCE, PROBES, STEPS, TOLERANCES, Method, Outcome


def methods(problem):
    if problem.target is None:
        return []
    density = problem.new_density()
    density.reference = fs.mixture.fit_mixture(problem.data)

    def exact(x, tolerance, seed):
        found = fs.probability_flow_log_prob(density, x, rtol=tolerance, atol=tolerance)
        return Outcome(found.log_prob, found.nfe, found.nfe * x.shape[1])

    def midpoint(x, steps, seed):
        found = fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps)
        return Outcome(found.log_prob, found.nfe, steps * x.shape[1])  # a trace a step

    def hutchinson(x, probes, seed):
        options = {"trace": "hutchinson", "probes": probes, "seed": seed}
        found = fs.probability_flow_log_prob(density, x, rtol=PROBE_TOLERANCE, atol=PROBE_TOLERANCE, **options)
        return Outcome(found.log_prob, found.nfe, found.nfe * probes)

    return [
        Method("fastscore ODE dopri5, exact trace", exact, TOLERANCES, random=False),
        Method("fastscore ODE midpoint, exact trace", midpoint, STEPS, random=False),
        Method("fastscore ODE dopri5, Hutchinson", hutchinson, PROBES),
    ]
