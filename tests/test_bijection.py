"""A user's own transform is asked once whether its inverse and its log-determinant are right."""

import math

import pytest
import torch
from analytic import ExactNet, mixture
from mixtures import ExactEps, Mixture
from torch.distributions import constraints
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    Transform,
    _InverseTransform,
)

import fastscore as fs

MIXTURE = Mixture(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double(), torch.tensor(0.4))


class Triple(Transform):
    """x = 3 z, right or with one mistake."""

    bijective, domain, codomain = True, constraints.real, constraints.real

    def __init__(self, undo=3.0, stretch=3.0, form="entry"):
        super().__init__()
        self.undo, self.stretch, self.form, self.asked = undo, stretch, form, 0

    def _call(self, z):
        self.asked += 1
        return 3 * z

    def _inverse(self, x):
        return x / self.undo

    def log_abs_det_jacobian(self, z, x):
        each = torch.full_like(z, math.log(self.stretch))
        return each if self.form == "entry" else each[0, 0] if self.form == "number" else each.sum(-1)


class Turned(Transform):
    """x = A z, of vectors."""

    bijective, domain, codomain = True, constraints.real_vector, constraints.real_vector

    def __init__(self, log_det=None):
        super().__init__()
        self.matrix = torch.tensor([[1.0, 2, 0], [0, 3, 1], [1, 0, 1]], dtype=torch.float64)
        self.log_det = float(self.matrix.det().abs().log()) if log_det is None else log_det

    def _call(self, z):
        return z @ self.matrix.T.to(z)

    def _inverse(self, x):
        return torch.linalg.solve(self.matrix.to(x), x.mT).mT

    def log_abs_det_jacobian(self, z, x):
        return z.new_full(z.shape[:-1], self.log_det)


class ByNumpy(Triple):
    """What autograd does not follow."""

    def _call(self, z):
        return torch.from_numpy(3 * z.detach().numpy())


def density(transform):
    return fs.Transformed(fs.ScoreDensity(ExactEps(MIXTURE, fs.VP()), fs.VP(), "eps"), transform)


@pytest.mark.parametrize(
    "transform",
    [Triple(), Triple(form="number"), Triple(form="sample"), Turned(), ByNumpy(), ComposeTransform([Triple()])],
    ids=lambda t: f"{type(t).__name__}, {getattr(t, 'form', '')}",
)
def test_right_ones_are_believed_and_asked_once(transform):
    z = MIXTURE.sample(20, torch.Generator().manual_seed(1))
    x, given = transform(z.double()).float(), density(transform)
    found = given.estimate(x, nfe=64, progress=False)
    volume = transform.log_det if isinstance(transform, Turned) else 3 * math.log(3)
    error = found.log_prob.double() - (MIXTURE.log_prob(z) - volume)
    assert float((error.abs() - 5 * found.stderr).max()) < 0
    before = getattr(transform, "asked", None)
    given.estimate(x, nfe=16, progress=False)
    assert getattr(transform, "asked", None) == before


@pytest.fixture(params=["_InverseTransform", "Inverse"])
def renamed(request):
    """Give torch's class of inverses the name that zuko gives it."""
    before, _InverseTransform.__name__ = _InverseTransform.__name__, request.param
    yield
    _InverseTransform.__name__ = before


@pytest.mark.parametrize(
    ("transform", "sentence"),
    [
        (Triple(undo=2.0), "the inverse of Triple.* must undo it, got x that comes back .* away"),
        (Triple(stretch=1.0), "log_abs_det_jacobian of Triple.*must be log.det dx/dz., got 0 nats .* says 3.2958"),
        (Turned(log_det=0.0), "log_abs_det_jacobian of Turned.*got 0 nats for a sample of 3 entries"),
        (ComposeTransform([ExpTransform(), Triple(stretch=1.0)]), "log_abs_det_jacobian of ComposeTransform"),
        (ComposeTransform([Triple(undo=4.0)]).inv, "must undo it"),
        (IndependentTransform(Triple(undo=2.0), 1), "must undo it"),
    ],
)
@pytest.mark.usefixtures("renamed")
def test_wrong_ones_are_refused(transform, sentence):
    """They gave log-densities 3 to 14 nats off."""
    x = MIXTURE.sample(20, torch.Generator().manual_seed(1)).abs()
    for call in (lambda d: d.estimate(x, nfe=16, progress=False), lambda d: d.log_prob(x, nfe=16)):
        with pytest.raises(ValueError, match=sentence):
            call(density(transform))


class Rotated(Transform):
    """A linear map by a matrix in a dtype of its own, as a PCA of scikit-learn's in float32."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def _call(self, z):
        return z @ self.matrix.T

    def _inverse(self, x):
        return x @ torch.linalg.inv(self.matrix).T

    def log_abs_det_jacobian(self, z, x):
        return torch.linalg.slogdet(self.matrix)[1].expand(z.shape[:-1])


def test_a_transform_whose_tensors_are_float32_is_evaluated_in_float32():
    """x went through it in float64: estimate, log_prob, fit and the ODE ended in torch's own sentence about dtypes."""
    target = mixture(3)
    density = fs.ScoreDensity(ExactNet(target, fs.VP()), fs.VP(), "eps")
    matrix = torch.eye(3) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    x = target.sample(8, seed=1).float() @ matrix.T
    single, double = (fs.Transformed(density, Rotated(m)) for m in (matrix, matrix.double()))
    expected = double.estimate(x, nfe=32).log_prob
    torch.testing.assert_close(single.estimate(x, nfe=32).log_prob, expected, rtol=1e-4, atol=1e-3)  # float32's z
    torch.testing.assert_close(single.log_prob(x, nfe=32), expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(
        ValueError, match=r"x is torch.float64 and Rotated\(\) has tensors of another"
    ):  # float64 through float32 would lose what was asked for
        single.estimate(x.double(), nfe=32)
