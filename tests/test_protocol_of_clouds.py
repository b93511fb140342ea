"""Every consumer of a density with centred clouds, with and without a mask, against the core and its coordinates."""

import math

import pytest
import torch
from transformed_densities import COUNT, SCHEDULE

import fastscore as fs
from fastscore.estimator.protocol import Density, check_density
from fastscore.metrics import BitsPerDim
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.transforms import zscore

pytestmark = pytest.mark.usefixtures("one_thread")

ATOMS = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]) > 0


class Cloud(torch.nn.Module):
    """A network of positions that sees all places, also those without an atom; `gain` is trainable."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x, t, shift=None):
        shift = 0 if shift is None else shift[:, :1, None]
        return self.gain * torch.tanh(x + x.mean(1, keepdim=True)) + 0.1 * (t[:, None, None] * x + shift).sin()


def clouds(masked):
    """Positions of 5 atoms in 2 dimensions, centred over those that are there, and what stands at the other places."""
    x = torch.randn(COUNT, 5, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    there = (ATOMS if masked else torch.ones_like(ATOMS))[..., None]
    mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True)
    return torch.where(there, x - mean, x)


def centred(**options):
    return fs.ZeroMeanDensity(Cloud(), SCHEDULE, **{"predicts": "eps", "program": False} | options)


class WithMask:
    """A density of clouds, and z beside its core, with the arguments that go along for each call."""

    def __init__(self, x, mask):
        self.density, self.x = centred(), x
        self.given = {} if mask is None else {"mask": mask}
        self.z, self.own = self.density.coordinates(x, mask)

    def sides(self):
        return (self.density, self.x, self.given), (self.density.core, self.z, self.own)


OF_CLOUDS = {
    "log_prob": lambda d, x, given: d.log_prob(x, nfe=16, seed=3, **given),
    "estimate": lambda d, x, given: d.estimate(x, nfe=16, seed=3, **given).log_prob,
    "captured": lambda d, x, given: fs.CapturedDensity(d, x, nfe=16, seed=3, **given)(x).log_prob,
    "with_reference": lambda d, x, given: (
        d.with_reference(d.core.reference).estimate(x, nfe=16, seed=3, **given).log_prob
    ),
    "ODE": lambda d, x, given: fs.probability_flow_log_prob(d, x, method="midpoint", steps=4, **given).log_prob,
    "loss": lambda d, x, given: -fs.density_loss(d, x, seed=3, reduction="none", **given),
    "regularization": lambda d, x, given: -fs.score_regularization(d, x, seed=3, reduction="none", **given),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all atoms", "masked"])
def test_every_consumer_takes_centred_clouds(masked, tmp_path):
    """As the core's z with its own mask and conditions: to rounding, since the basis is orthonormal."""
    x, mask = clouds(masked), ATOMS if masked else None
    both = WithMask(x, mask)
    for name, consumer in OF_CLOUDS.items():
        found, expected = (consumer(*side) for side in both.sides())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    density = both.density
    found = density.estimate(x, nfe=16, seed=3, **both.given)
    dims = (ATOMS.sum(1) - 1) * 2 if masked else 8
    assert torch.equal(torch.as_tensor(found.dims), torch.as_tensor(dims))
    metric = BitsPerDim(density, nfe=16, seed=3)
    metric.update(x, **both.given)
    torch.testing.assert_close(metric.compute()["bits_per_dim"], found.bits_per_dim().mean(), rtol=0, atol=1e-9)
    stored = evaluate_dataset(density, x, tmp_path / "o.npz", nfe=16, seed=3, batch=2, **both.given)
    torch.testing.assert_close(stored.log_prob, found.log_prob, rtol=0, atol=1e-9)
    assert torch.equal(torch.as_tensor(stored.dims), torch.as_tensor(dims))
    classes = {"shift": torch.arange(3.0).double()[:, None]}
    first = {"shift": torch.zeros(COUNT, 1, dtype=torch.float64)}
    sides = []
    for d, data, given in both.sides():
        given = dict(given)
        own = {"cond": given.pop("cond")} if given.get("cond") else {}
        sides.append(
            fs.DiffusionClassifier(d, classes).classify(data, nfe=32, error=None, seed=3, **given, **own).log_likelihood
        )
    torch.testing.assert_close(*sides, rtol=0, atol=1e-9)
    second = {"shift": first["shift"] + 1}
    compared = density.compare(x, first, second, nfe=32, **both.given)
    assert compared.difference.shape == (COUNT,)
    assert float(compared.difference.abs().min()) > 0


def test_a_captured_cloud_sees_other_places_anew():
    """What stands where no atom is changes the answer, and a graph that was captured takes the new one."""
    x = clouds(True)
    captured = fs.CapturedDensity(centred(), x, nfe=16, seed=3, mask=ATOMS)
    moved = torch.where(ATOMS[..., None], x, x + 1)
    found, expected = captured(moved).log_prob, centred().estimate(moved, nfe=16, seed=3, mask=ATOMS).log_prob
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float((expected - captured(x).log_prob)[~ATOMS.all(1)].abs().min()) > 1e-4


@pytest.mark.parametrize("name", ["log_prob", "ODE", "loss", "regularization"])
def test_gradients_reach_clouds_and_what_is_around_them(name):
    x = clouds(True).requires_grad_()
    consumer, density = OF_CLOUDS[name], centred()
    (found,) = torch.autograd.grad(consumer(density, x, {"mask": ATOMS}).sum(), x)
    atoms = ATOMS[..., None]
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    way = torch.where(atoms, way - (way * atoms).sum(1, keepdim=True) / atoms.sum(1, keepdim=True), way)
    ends = [float(consumer(density, x.detach() + s * 1e-5 * way, {"mask": ATOMS}).sum()) for s in (-1, 1)]
    # Central differences: third derivatives times 1e-10.
    assert float((found * way).sum()) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-5)
    assert float(found[~ATOMS].abs().max()) > 0


def test_what_needs_entries_of_their_own_refuses_centred_clouds():
    with pytest.raises(ValueError, match="centred positions have fewer dimensions than entries; give the density"):
        fs.Transformed(centred(), zscore(0.0, 2.0))
    with pytest.raises(ValueError, match="needs levels of each entry, which centred positions do not have"):
        fs.discrete_log_prob(centred(), torch.zeros(2, 5, 2, dtype=torch.int64), fs.Levels())


def test_positions_in_other_units_as_the_refusal_says():
    """log p(s z) = log p(z) + dims log(1 / s): by the exact Gaussian in the subspace."""
    scale, z = 3.0, clouds(False)
    reference = fs.Reference.isotropic(1.0)
    inner, outer = reference.log_prob(centred().to_network(z)[0].flatten(1)), fs.Reference.isotropic(scale)
    found = inner + 8 * math.log(1 / scale)
    torch.testing.assert_close(found, outer.log_prob(centred().to_network(scale * z)[0].flatten(1)))


def test_centred_clouds_have_what_the_protocol_names():
    density = centred(nfe=32)
    assert check_density(density) is density
    for name in Density.__annotations__:
        if name != "subspace":
            assert getattr(density, name) == getattr(density.core, name), name
    other = density.with_reference(fs.Reference.isotropic(2.0))
    assert float(other.core.reference.variance) == 4
    assert other.model is density.model
    assert density.subspace == "centred positions"
    assert not density.core.subspace
