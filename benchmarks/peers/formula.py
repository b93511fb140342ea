r"""The formula: fastscore fitted and without data, and plain Monte Carlo.

.. math:: -\tfrac d2 \log(2\pi e) - \tfrac12\int (E\|\epsilon-\hat\epsilon\|^2 - d\,\mathrm{sigmoid}(\lambda))\,d\lambda
"""

from fastscore.demo.comparison import plain_monte_carlo

from . import Method, Outcome

LADDER = tuple(2**k for k in range(3, 16))


def methods(problem):
    unfitted, (fitted, seconds) = problem.new_density(), problem.fitted

    def estimate(density):
        def run(x, nfe, seed):
            found = density.estimate(x, nfe=nfe, seed=seed)
            return Outcome(found.log_prob, float(found.nfe.double().mean()))

        return run

    def plain(x, nfe, seed):
        return Outcome(plain_monte_carlo(unfitted, x, nfe, seed), nfe)

    return [
        Method("fastscore, fitted", estimate(fitted), LADDER, fit=seconds),
        Method("fastscore, no data", estimate(unfitted), LADDER),
        Method("plain formula", plain, LADDER),
    ]
