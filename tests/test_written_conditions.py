"""Networks that write into what they are called with get the same numbers, and leave the caller's own as it was."""

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.metrics import NegativeLogLikelihood

SCHEDULE = fs.VP()
TARGET = mixture(3)
X = TARGET.sample(12, seed=0)
SHIFT = 10 * torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """The exact network of data that a condition moves by a tenth of it, which forward divides in place or not."""

    def __init__(self, in_place, x_too=False):
        super().__init__()
        self.exact, self.in_place, self.x_too = ExactNet(TARGET, SCHEDULE), in_place, x_too

    def forward(self, x, t, c):
        c = c.div_(10) if self.in_place else c / 10
        alpha, _ = SCHEDULE.alpha_sigma(t)
        by = alpha.to(x)[:, None] * c
        x = x.sub_(by) if self.x_too else x - by
        return self.exact(x, t)


def density(in_place, **options):
    return fs.ScoreDensity(Scaled(in_place, **options), SCHEDULE, "eps")


def none_like(c):
    return torch.zeros_like(c) if isinstance(c, torch.Tensor) else fs.shared(torch.zeros_like(c.value))


CALLS = {
    "estimate": lambda d, x, c: d.estimate(x, nfe=32, c=c).log_prob,
    "log_prob": lambda d, x, c: d.log_prob(x, nfe=32, c=c),
    "elbo": lambda d, x, c: fs.ScoreDensity(d.model, SCHEDULE, "eps").estimate(x, nfe=32, method="elbo", c=c).log_prob,
    "compare": lambda d, x, c: d.compare(x, {"c": c}, {"c": none_like(c)}, nfe=32).difference,
    "loss": lambda d, x, c: fs.density_loss(d, x, seed=0, c=c),
    "ODE": lambda d, x, c: fs.probability_flow_log_prob(d, x, method="midpoint", steps=8, c=c).log_prob,
}


@pytest.mark.parametrize("of_samples", [1, 2, 12, 0])
@pytest.mark.parametrize("call", CALLS)
def test_a_network_may_divide_its_condition_in_place(call, of_samples):
    """Taken for the network's own to try it out, a condition was divided by ten or a hundred: 5 to 12 nats too low."""
    x = X[: of_samples or 4] + (SHIFT[:of_samples] if of_samples else SHIFT[:1]) / 10
    given = SHIFT[:of_samples].clone() if of_samples else fs.shared(SHIFT[:1].clone())
    before = SHIFT[: of_samples or 1]
    found, expected = CALLS[call](density(True), x, given), CALLS[call](density(False), x, given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # float32, and a division less
    assert torch.equal(given if of_samples else given.value, before)


def test_a_metric_takes_its_first_batch_as_the_others():
    values = []
    for in_place in (True, False):
        metric = NegativeLogLikelihood(density(in_place), nfe=32)
        for x, c in zip((X + SHIFT / 10).split(4), SHIFT.clone().split(4)):
            metric.update(x, c=c)
        values.append(metric.compute()["nll"])
    torch.testing.assert_close(*values, rtol=1e-5, atol=0)


def test_labels_counted_from_one_are_made_so_in_place():
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(ExactNet(mixture(3, seed=k), SCHEDULE) for k in range(2))

        def forward(self, x, t, y):
            y -= 1
            return torch.stack([part(x, t) for part in self.parts])[y, torch.arange(len(x))]

    y = torch.full((12,), 2)
    found = fs.ScoreDensity(Labelled(), SCHEDULE, "eps").estimate(X, nfe=64, y=y)
    right = fs.ScoreDensity(ExactNet(mixture(3, seed=1), SCHEDULE), SCHEDULE, "eps").estimate(X, nfe=64)
    torch.testing.assert_close(found.log_prob, right.log_prob, rtol=1e-5, atol=1e-5)
    assert y.tolist() == [2] * 12


def test_a_shared_condition_that_is_left_alone_is_passed_as_it_is():
    seen = []

    class Looks(Scaled):
        def forward(self, x, t, c):
            seen.append(c.data_ptr())
            return super().forward(x, t, c)

    shared = torch.zeros(1, 3)
    made = fs.ScoreDensity(Looks(False), SCHEDULE, "eps", program=False)
    for _ in range(2):
        made.estimate(X, nfe=16, c=fs.shared(shared))
    assert seen[0] != shared.data_ptr()  # the first call tells whether it is written into
    assert set(seen[1:]) == {shared.data_ptr()}


def test_a_network_that_writes_into_a_condition_later_on_is_refused():
    class Later(Scaled):
        late = False

        def forward(self, x, t, c):
            if self.late:
                c += 1
            return super().forward(x, t, c)

    made, shared = fs.ScoreDensity(Later(False), SCHEDULE, "eps", program=False), fs.shared(torch.zeros(1, 3))
    made.estimate(X, nfe=16, c=shared)
    made.model.late = True
    with pytest.raises(ValueError, match="written into the condition 'c', which it left alone in an earlier call"):
        made.estimate(X, nfe=16, c=shared)


def test_the_ode_takes_a_network_that_writes_into_x_t_or_into_one_buffer():
    """Autograd refuses to write into a leaf: the sentence was that the network does not take data of this shape."""

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.exact, self.buffer = ExactNet(TARGET, SCHEDULE), None

        def forward(self, x, t):
            found = self.exact(x, t)
            if self.buffer is None or self.buffer.shape != found.shape:
                self.buffer = torch.empty_like(found)
            self.buffer = self.buffer.detach().copy_(found)
            return self.buffer

    options = {"method": "midpoint", "steps": 8}
    exact = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps")
    right = fs.probability_flow_log_prob(exact, X[:4], **options).log_prob
    buffered = fs.ScoreDensity(Buffered(), SCHEDULE, "eps")
    torch.testing.assert_close(fs.probability_flow_log_prob(buffered, X[:4], **options).log_prob, right)
    moved, c = X[:4] + SHIFT[:4] / 10, SHIFT[:4]
    writes = fs.probability_flow_log_prob(density(True, x_too=True), moved, **options, c=c).log_prob
    right = fs.probability_flow_log_prob(density(False), moved, **options, c=c).log_prob
    torch.testing.assert_close(writes, right, rtol=1e-4, atol=1e-4)
