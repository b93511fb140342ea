"""Every consumer of a density with every kind of transform, against the exact change of variables."""

import math
from types import SimpleNamespace

import pytest
import torch
from analytic import Target
from click.testing import CliRunner
from torch.distributions import AffineTransform
from transformed_densities import (
    COUNT,
    SCHEDULE,
    SHAPE,
    TARGET,
    TRANSFORMS,
    D,
    Z,
    core,
    forward,
    log_det,
    through,
)

import fastscore as fs
from fastscore.estimator.protocol import Density, check_density
from fastscore.metrics import BitsPerDim, NegativeLogLikelihood
from fastscore.runs.blocks import Work
from fastscore.runs.evaluate import evaluate_dataset
from fastscore.transforms import zscore

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = {"shift": 0.3 * torch.arange(3.0).double()[:, None].expand(3, D)}  # class 0 is the network's own


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
    torch.testing.assert_close([*found], [*core().compare(Z, a, b, nfe=32)], rtol=0, atol=1e-7)


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
        options = {"nfe": 16, "method": "density", "control": "reference", "target_stderr": None}
        return Work.check(fs.Transformed(core(), transform), Z, None, 2, torch.device("cpu"), options).setting()

    one, same, other, flipped = (setting(AffineTransform(0.0, s)) for s in (1.0, 1.0, 1.1, -1.0))
    assert one == same
    # The network gets other data, and so its answer is another too, which a message leaves out beside the transform.
    assert [key for key in one if one[key] != other[key]] == ["transform", "network's answer"]
    assert one["transform"] != flipped["transform"]


def test_the_callback_logs_the_metric_of_a_transformed_density():
    from fastscore.lightning import LogDensity

    logged, x = {}, forward(Z, TRANSFORMS["zscore"])
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values, **_: logged.update(values))
    callback = LogDensity(NegativeLogLikelihood(through(core(), TRANSFORMS["zscore"]), nfe=16))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), callbacks=[callback], num_val_batches=[1])
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
