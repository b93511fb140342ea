"""fastscore's own probability-flow ODE, with the fitted reference as its control variate and without data."""

import fastscore as fs

from . import STEPS, Method, Outcome

ERRORS = (0.5, 0.1, 0.03, 0.01, 0.003)  # nats, that "auto" is asked for
STEPS_AND_PROBES = tuple((8 * 2 ** (k // 2), 4**k) for k in range(6))


def methods(problem):
    if problem.target is None:
        return []
    fitted, seconds = problem.fitted
    unfitted = problem.new_density()

    def midpoint(density):
        def run(x, steps, seed):
            found = fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps)
            return Outcome(found.log_prob, 2 * steps + 1, (steps + 2) * x.shape[1])  # a trace a step, one at either end

        return run

    def auto(x, error, seed):
        found = fs.probability_flow_log_prob(fitted, x, error=error)
        forward = float(found.nfe.double().mean())
        return Outcome(found.log_prob, forward, (forward / 2 + 1) * x.shape[1])

    def hutchinson(x, effort, seed):
        steps, probes = effort
        options = {"method": "midpoint", "steps": steps, "trace": "hutchinson", "probes": probes, "seed": seed}
        found = fs.probability_flow_log_prob(fitted, x, **options)
        return Outcome(found.log_prob, 2 * steps + 1, (steps + 2) * probes)

    return [
        Method("fastscore ODE midpoint, fitted", midpoint(fitted), STEPS, fit=seconds, random=False),
        Method("fastscore ODE auto, fitted", auto, ERRORS, fit=seconds, random=False),
        Method("fastscore ODE midpoint, no data", midpoint(unfitted), STEPS, random=False),
        Method("fastscore ODE Hutchinson, fitted", hutchinson, STEPS_AND_PROBES, fit=seconds),
    ]
