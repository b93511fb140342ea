"""Every consumer of a density with every kind of density, against the exact change of variables."""

import math
from types import SimpleNamespace

import pytest
import torch
from analytic import ExactNet, Target, mixture
from click.testing import CliRunner
from torch.distributions import AffineTransform, ComposeTransform, TanhTransform
from torch.distributions.transforms import ReshapeTransform

import fastscore as fs
from fastscore.estimator.protocol import Density, check_density
from fastscore.metrics import BitsPerDim, NegativeLogLikelihood
from fastscore.runs.blocks import Work
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.transforms import Logit, Whitening, whiten, zscore

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE, D, COUNT = (1, 2, 2), 4, 5
TARGET, SCHEDULE = mixture(D), fs.LogSNR(-8, 6)
MEAN, STD = torch.tensor([1.0, -20.0, 0.0, 3.0]).reshape(SHAPE), torch.tensor([0.1, 5.0, 1.0, 30.0]).reshape(SHAPE)
Z = TARGET.sample(COUNT, seed=3).reshape(COUNT, *SHAPE)
CLASSES = {"shift": 0.3 * torch.arange(3.0).double()[:, None].expand(3, D)}  # class 0 is the network's own


def whitening():
    normal = torch.randn(200, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = whiten(normal @ torch.diag(STD.double().flatten()) + 3)
    return Whitening(found.mean.reshape(SHAPE), found.basis, found.std)


TRANSFORMS = {
    "zscore": [zscore(0.5, 0.5)],
    "zscore of elements": [zscore(MEAN, STD)],
    "negative scale": [AffineTransform(2.0, -3.0)],
    "logit": [Logit(0.0, 255.0)],
    "whitening": [whitening()],
    "composed": [ComposeTransform([TanhTransform(), AffineTransform(2.0, 3.0)])],
    "reshaped": [ReshapeTransform(SHAPE, (D,))],
    "twice": [zscore(MEAN, STD), AffineTransform(0.0, 1 / 60), Logit(-1.0, 1.0), AffineTransform(0.0, 7.0)],
}


def core(reference=None, gain=0.9):
    net = ExactNet(TARGET, SCHEDULE, gain=gain)
    return fs.ScoreDensity(net, SCHEDULE, reference=reference, program=False)


def through(density, transforms):
    for transform in transforms:
        density = fs.Transformed(density, transform)
    return density


def forward(z, transforms):
    for transform in transforms:
        z = transform(z)
    return z


def log_det(z, transforms):
    """log|det dx/dz| of each sample, from the Jacobian of the whole map."""

    def whole(row):
        return forward(row.reshape(1, *SHAPE), transforms).flatten()

    jacobian = torch.stack([torch.autograd.functional.jacobian(whole, row.flatten()) for row in z])
    return torch.linalg.slogdet(jacobian)[1]


def by_metric(density, x):
    metric = NegativeLogLikelihood(density, nfe=16, seed=3)
    rows = [metric(x[i : i + 1], sample_index=torch.tensor([i]))["nll"] for i in range(len(x))]
    assert float(metric.compute()["nll"]) == pytest.approx(float(torch.stack(rows).mean()), abs=1e-9)
    return -torch.stack(rows)


def by_data_set(density, x, folder):
    return evaluate_dataset(density, x, folder / f"{id(density)}.npz", nfe=16, seed=3, batch=2).log_prob


def by_classifier(density, x):
    return fs.DiffusionClassifier(density, CLASSES).classify(x, nfe=32, error=None, seed=3).log_likelihood[:, 0]


CONSUMERS = {
    "log_prob": lambda d, x: d.log_prob(x, nfe=16, seed=3),
    "estimate": lambda d, x: d.estimate(x, nfe=16, seed=3).log_prob,
    "captured": lambda d, x: fs.CapturedDensity(d, x + 0.01, nfe=16, seed=3)(x)[0],
    "with_reference": lambda d, x: d.with_reference(d.core.reference).estimate(x, nfe=16, seed=3).log_prob,
    "ODE": lambda d, x: fs.probability_flow_log_prob(d, x, method="midpoint", steps=4).log_prob,
    "ODE by probes": lambda d, x: (
        fs.probability_flow_log_prob(d, x, trace="hutchinson", probes=2, method="midpoint", steps=2).log_prob
    ),
    "classifier": by_classifier,
    "loss": lambda d, x: -fs.density_loss(d, x, seed=3, reduction="none"),
    "loss at adaptive nodes": lambda d, x: (
        -fs.density_loss(d, x, seed=3, reduction="none", nodes=fs.AdaptiveNodes(d.schedule))
    ),
    "regularization": lambda d, x: -fs.score_regularization(d, x, seed=3, reduction="none"),
    "metric": by_metric,
}
DIFFERENTIABLE = ("log_prob", "ODE", "ODE by probes", "loss", "regularization")


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "fitted"])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_consumer_adds_the_determinant(kind, fitted, tmp_path):
    """To rounding: of float64, and of a map and its inverse."""
    inner, transforms = core(), TRANSFORMS[kind]
    if fitted:
        data = TARGET.sample(60, seed=1).reshape(-1, *SHAPE)
        through(inner, transforms).fit(forward(data, transforms), evaluations=4000, progress=False)
        assert inner.reference.mean.shape[1] == D
    density, x, determinant = through(inner, transforms), forward(Z, transforms), log_det(Z, transforms)
    for name, consumer in CONSUMERS.items():
        found, expected = consumer(density, x), consumer(inner, Z) - determinant
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    found, expected = by_data_set(density, x, tmp_path), by_data_set(inner, Z, tmp_path) - determinant
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_consumer_gives_the_exact_density(kind):
    """The reference is the target and the network exact, so that nothing is left but rounding."""
    target = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, D), 0.09))
    transforms = TRANSFORMS[kind]
    density, x, determinant = through(core(target, None), transforms), forward(Z, transforms), log_det(Z, transforms)
    clean = math.exp(-density.log_snr_range[1])  # the ODE starts where this variance is left
    convolved = Target(TARGET.weight, TARGET.mean, TARGET.cov + clean * torch.eye(D))
    for name, consumer in CONSUMERS.items():
        own = convolved if name.startswith("ODE") else TARGET
        exact = own.log_prob(Z.flatten(1)) - determinant
        error = (consumer(density, x) - exact).abs().max()
        assert float(error) < 2e-6, name


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_gradients_reach_x_through_the_transform(kind):
    inner, transforms = core(), TRANSFORMS[kind]
    density, x = through(inner, transforms), forward(Z, transforms).detach().requires_grad_()
    for name in DIFFERENTIABLE:
        consumer = CONSUMERS[name]
        (found,) = torch.autograd.grad(consumer(density, x).sum(), x)
        z, total = x, 0.0
        for transform in reversed(transforms):
            back = transform.inv(z)
            total = total + transform.log_abs_det_jacobian(back, z).sum()
            z = back
        (expected,) = torch.autograd.grad(consumer(inner, z).sum() - total, x)
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def test_an_adapters_density_goes_everywhere(tmp_path):
    """Images in [0, 1], a network that sees 2 x - 1, and the table of denoising-diffusion-pytorch."""
    lucidrains = pytest.importorskip("adapters.test_lucidrains")
    density = fs.adapters.from_lucidrains(lucidrains.diffusion(lucidrains.Exact("pred_v")), program=False)
    z = 0.1 * Z
    for name, consumer in CONSUMERS.items():
        if name == "classifier":  # its network has no condition
            continue
        if name.startswith("ODE"):
            with pytest.raises(ValueError, match=r"between the timesteps of DDPM\(500 .*use estimate"):
                consumer(density, (z + 1) / 2)
            continue
        expected = consumer(density.core, z) + D * math.log(2)
        torch.testing.assert_close(consumer(density, (z + 1) / 2), expected, rtol=0, atol=2e-6)
    expected = by_data_set(density.core, z, tmp_path) + D * math.log(2)
    torch.testing.assert_close(by_data_set(density, (z + 1) / 2, tmp_path), expected, rtol=0, atol=2e-6)


def test_bits_per_dim_are_those_of_the_users_levels():
    density, low, high = fs.Transformed(core(), zscore(127.5, 127.5)), -0.5, 255.5
    x = 127.5 + 127.5 * Z
    users = BitsPerDim(density, 256, low, high, nfe=16)
    networks = BitsPerDim(core(), 256, low / 127.5 - 1, high / 127.5 - 1, nfe=16)
    users.update(x)
    networks.update(Z)
    for name, value in users.compute().items():
        torch.testing.assert_close(value, networks.compute()[name], rtol=0, atol=1e-8)


def test_a_comparison_has_no_determinant():
    density, a, b = through(core(), TRANSFORMS["twice"]), {"shift": torch.zeros(D)}, {"shift": 0.1 * torch.ones(D)}
    a, b = ({"shift": c["shift"].expand(COUNT, D)} for c in (a, b))
    found = density.compare(forward(Z, TRANSFORMS["twice"]), a, b, nfe=32)
    torch.testing.assert_close(found, core().compare(Z, a, b, nfe=32), rtol=0, atol=1e-7)


def levels_of(count=COUNT, bins=16):
    return torch.randint(bins, (count, *SHAPE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transforms", [TRANSFORMS["zscore"], [zscore(0.25, 0.25), AffineTransform(0.0, 2.0)]])
def test_levels_are_those_of_the_network(transforms):
    k, levels = levels_of(), fs.Levels(16, 0.0, 1.0)
    found = fs.discrete_log_prob(through(core(), transforms), k, levels, nfe=16)
    expected = fs.discrete_log_prob(core(), k, fs.Levels(16, -1.0, 1.0), nfe=16)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-4)  # float32 sums of about 30 nats
    assert float(found.truncation) == 0


def test_levels_turn_round_with_a_negative_scale():
    k, levels = levels_of(), fs.Levels(16, -1.0, 1.0)
    found = fs.discrete_log_prob(fs.Transformed(core(), AffineTransform(0.0, -1.0)), k, levels, nfe=16)
    expected = fs.discrete_log_prob(core(), 15 - k, levels, nfe=16)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-4)


def test_levels_of_elements_with_scales_of_their_own():
    """A Gaussian of independent elements, its own reference: the bound is the sum of those of one element each."""
    variance, k, levels = torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), levels_of(), fs.Levels(16, 0.0, 15.0)

    def gaussian(own):
        target = Target(torch.ones(1), torch.zeros(1, len(own)), torch.diag(own)[None])
        reference = fs.Reference(torch.ones(1), torch.zeros(1, len(own)), own[None])
        return fs.ScoreDensity(ExactNet(target, fs.LogSNR(-8, 8)), fs.LogSNR(-8, 8), reference=reference, program=False)

    found = fs.discrete_log_prob(fs.Transformed(gaussian(variance), zscore(MEAN, STD)), k, levels, nfe=16)
    total = 0.0
    for i, (mean, std) in enumerate(zip(MEAN.flatten().double(), STD.flatten().double())):
        ends = float((0 - mean) / std), float((15 - mean) / std)
        alone, own_k = gaussian(variance[i : i + 1]), k.flatten(1)[:, i : i + 1]
        own = fs.discrete_log_prob(alone, own_k, fs.Levels(16, *ends), nfe=16)
        total = total + own.log_prob
    # float32 values of size up to 150 / 0.2, of a log-probability of up to 1e5 nats at the far levels.
    torch.testing.assert_close(found.log_prob, total, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["logit", "whitening", "composed"])
def test_levels_that_are_not_equidistant_are_refused(kind):
    low, high = {"logit": (1.0, 254.0), "whitening": (0.0, 1.0), "composed": (0.0, 4.0)}[kind]
    with pytest.raises(ValueError, match=r"equidistant for the network.*dequantize them"):
        fs.discrete_log_prob(through(core(), TRANSFORMS[kind]), levels_of(), fs.Levels(16, low, high), nfe=16)
    with pytest.raises(ValueError, match=r"inside the range of Logit|no value for some of the levels"):
        fs.discrete_log_prob(fs.Transformed(core(), Logit(0, 1)), levels_of() // 16 + 1, fs.Levels(16, 0, 1), nfe=16)


def test_the_command_line_takes_a_transformed_density(tmp_path, monkeypatch):
    import numpy as np

    from fastscore.cli.commands import main

    code = "import torch, test_protocol as t\ndef make():\n    return t.through(t.core(), t.TRANSFORMS['twice'])\n"
    (tmp_path / "own_density.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = forward(Z, TRANSFORMS["twice"])
    np.save("x.npy", x.numpy())
    words = "evaluate own_density:make x.npy --out o.npz --nfe 16 --device cpu"
    done = CliRunner().invoke(main, words.split())
    assert done.exit_code == 0, done.output
    expected = core().estimate(Z, nfe=16).log_prob - log_det(Z, TRANSFORMS["twice"])
    torch.testing.assert_close(torch.from_numpy(np.load("o.npz")["log_prob"]), expected, rtol=0, atol=2e-6)


def test_a_resumed_run_tells_transforms_apart():
    def setting(transform):
        options = {"nfe": 16, "method": "density", "target_stderr": None}
        return Work.check(fs.Transformed(core(), transform), Z, None, 2, torch.device("cpu"), options).setting()

    one, same, other, flipped = (setting(AffineTransform(0.0, s)) for s in (1.0, 1.0, 1.1, -1.0))
    assert one == same
    assert [key for key in one if one[key] != other[key]] == ["transform"]
    assert one["transform"] != flipped["transform"]


def test_the_callback_logs_the_metric_of_a_transformed_density():
    from fastscore.lightning import LogDensity

    logged, x = {}, forward(Z, TRANSFORMS["zscore"])
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values, **_: logged.update(values))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), sanity_checking=False, current_epoch=0)
    callback = LogDensity(NegativeLogLikelihood(through(core(), TRANSFORMS["zscore"]), nfe=16))
    callback.on_validation_epoch_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, None, x, 0)
    callback.on_validation_epoch_end(trainer, module)
    expected = D * math.log(0.5) - float(core().estimate(Z, nfe=16).log_prob.mean())
    assert float(logged["nll"]) == pytest.approx(expected, abs=1e-5)  # Lightning keeps float32


def test_what_is_no_density_is_refused_everywhere(tmp_path):
    net, x = torch.nn.Linear(2, 2), torch.zeros(3, 2)
    calls = {
        "metric": lambda: NegativeLogLikelihood(net),
        "discrete": lambda: fs.discrete_log_prob(net, x.long(), fs.Levels()),
        "ODE": lambda: fs.probability_flow_log_prob(net, x),
        "classifier": lambda: fs.DiffusionClassifier(net, {"y": torch.arange(3)}),
        "loss": lambda: fs.score_regularization(net, x, seed=0),
        "captured": lambda: fs.CapturedDensity(net, x),
        "data set": lambda: evaluate_dataset(net, x, tmp_path / "o.npz"),
        "transformed": lambda: fs.Transformed(net, zscore(0.0, 1.0)),
    }
    for call in calls.values():
        with pytest.raises(
            TypeError,
            match="density must be a ScoreDensity, a Transformed one or a ZeroMeanDensity, got Linear; wrap the",
        ):
            call()


def test_the_protocol_is_what_both_kinds_have():
    density = through(core(), TRANSFORMS["twice"])
    assert check_density(density) is density
    assert isinstance(density.core, fs.ScoreDensity)
    assert density.core.core is density.core
    for name in Density.__annotations__:
        assert getattr(density, name) == getattr(density.core, name), name
    z, nothing = density.core.to_network(Z)
    assert z is Z
    assert torch.equal(nothing, torch.zeros(COUNT, dtype=torch.float64))
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Density,), {})()
    fresh = density.with_reference(None)
    assert float(fresh.core.reference.variance) == SCHEDULE.data_std**2
    assert fresh.core.model is density.model


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
    return fs.ZeroMeanDensity(Cloud(), SCHEDULE, program=False, **options)


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
