"""From x to an estimate: samples, nodes, the integrand, sums with their errors, and the pilot that `fit` runs."""
