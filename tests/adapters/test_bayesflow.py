"""bayesflow: its own networks, noise schedules, adapters and ODE; exact networks inside its classes' conversions."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adapters.exact import TARGET, assert_exact, column, exact, moved, relative
from analytic import Target

from fastscore import probability_flow_log_prob
from fastscore.adapters import from_bayesflow
from fastscore.reference.fitting import fit_mixture
from fastscore.reference.gaussians import Reference

os.environ.setdefault("KERAS_BACKEND", "torch")
bf = pytest.importorskip("bayesflow")
torch.set_grad_enabled(True)  # bayesflow turns it off when it is imported
keras = pytest.importorskip("keras")
if keras.backend.backend() != "torch":
    pytest.skip("keras runs on another backend than torch", allow_module_level=True)

D, CONDITION = 4, 2
SMALL = {"subnet_kwargs": {"widths": (16, 16)}}
Approximator = getattr(bf, "BasicEstimator", None) or bf.ContinuousApproximator  # its name since 2.1, and before
CORRELATED = Target(torch.ones(1), torch.zeros(1, D), (0.6 ** (torch.arange(D)[:, None] - torch.arange(D)).abs())[None])
CUT = {"min_log_snr": -9.0, "max_log_snr": 12.0}
NOISES = {
    "edm": {"noise_schedule": "edm"},
    "edm, wide": {"noise_schedule": "edm", "schedule_kwargs": {"sigma_data": 2.0, "sigma_min": 0.01}},
    "exploding": {"noise_schedule": "edm", "schedule_kwargs": {"variance_type": "exploding"}},
    "cosine": {"noise_schedule": "cosine", "schedule_kwargs": CUT},
    "cosine, shifted": {"noise_schedule": "cosine", "schedule_kwargs": {"shift": 0.7, **CUT}},
}
PREDICTIONS = ("velocity", "noise", "F", "x", "score")


def shifted(condition):
    """The target is theta - (c1, c2, -c1, -c2): what an exact posterior must do with its observation."""
    return torch.cat([condition, -condition], -1)


class Exact(keras.Layer):
    """The subnet with which a network of the library is exact: its own conversion, solved for the prediction."""

    def __init__(self, network, target):
        super().__init__(dtype="float64")
        vars(self)["owner"] = (network,)  # keras would make it a part of this layer
        self.target, self.built = target, True

    def call(self, inputs, training=False):
        z, time, condition = inputs
        (network,) = self.owner
        shift = 0.0 if condition is None else shifted(condition.double())
        if "FlowMatching" in type(network).__name__:
            clean = (time if data_at(network) == 1 else 1 - time)[:, 0].double().clamp(1e-6, 1 - 1e-6)
            eps, x0 = exact(z - column(clean, z) * shift, clean, 1 - clean, self.target)
            return (x0 + shift - eps) * (1 if data_at(network) == 1 else -1)
        noise = network.noise_schedule
        log_snr = (time + 1) / 2 * (noise.log_snr_max - noise.log_snr_min) + noise.log_snr_min
        alpha, sigma = noise.get_alpha_sigma(log_snr)
        _, x0 = exact(z - alpha * shift, alpha[:, 0], sigma[:, 0], self.target)

        def converted(prediction):
            found = {"z": z, "alpha_t": alpha, "sigma_t": sigma, "log_snr_t": log_snr}
            kind = network._prediction_type
            return network.convert_prediction_to_x(pred=prediction, prediction_type=kind, **found)

        none, one = converted(torch.zeros_like(z)), converted(torch.ones_like(z))
        return (x0 + shift - none) / (one - none)


def data_at(network):
    """The time at which data lie, by the times at which the library starts and ends its own ODE."""
    return 0 if int(bf.__version__.split(".")[1]) >= 1 else 1


def network(kind="diffusion", condition=True, build=True, **options):
    keras.utils.set_random_seed(0)
    made = (bf.networks.FlowMatching if kind == "flow" else bf.networks.DiffusionModel)(**SMALL, **options)
    if build:
        made.build((None, D), (None, CONDITION) if condition else None)
    return made


def made_exact(made, target=TARGET):
    """Put the exact subnet into a built network, and nothing behind it."""
    return with_subnet(made, Exact(made, target), "float64")


def with_subnet(made, subnet, dtype="float32"):
    """Return a built network with another subnet and no projector, which keras does not allow by assignment."""
    del made._modules["subnet"], made._modules["output_projector"]
    made._modules.pop("torch_params", None)  # the weights of both
    vars(made).update(subnet=subnet, output_projector=keras.layers.Identity(dtype=dtype))
    return made


def all_kinds():
    return [pytest.param("flow", {}, id="flow")] + [pytest.param("diffusion", o, id=n) for n, o in NOISES.items()]


@pytest.mark.parametrize(("kind", "options"), all_kinds())
def test_outputs_are_those_of_the_network(kind, options):
    made = network(kind, **options)
    z, condition = torch.randn(3, D), torch.randn(3, CONDITION)
    density = from_bayesflow(made, condition[:1])
    if kind == "flow":
        t = torch.tensor([0.01, 0.5, 0.99])
        own = made.velocity(z, time=t, conditions=condition)
        assert torch.equal(density.model(z, t, condition=condition), own)
    else:
        log_snr = torch.tensor([-6.0, 0.0, 8.0])
        own = made.score(z, log_snr_t=log_snr[:, None], conditions=condition)
        t = density.schedule.time(log_snr)
        found = density.model(z, t, condition=condition)
        wide = made.score(z.double(), log_snr_t=log_snr[:, None].double(), conditions=condition)
        assert relative(found, wide) < 1e-6  # a time of float64 or float32
        assert relative(found, own.double()) < 1e-2  # the library's float32 at sigma = 0.02: (alpha x - z) / sigma^2
    shared = density.model(z, t)
    assert torch.equal(shared[0], density.model(z, t, condition=condition[:1].expand(3, -1))[0])
    assert float((shared[1:] - density.model(z, t, condition=condition)[1:]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_that_of_the_schedule(name):
    made = network(**NOISES[name])
    noise, schedule = made.noise_schedule, from_bayesflow(made).schedule
    at = getattr(noise, "log_snr", None) or noise.get_log_snr
    log_snr = at(torch.linspace(0, 1, 60, dtype=torch.float64), training=False)
    own = torch.stack(noise.get_alpha_sigma(log_snr), 1)
    found = torch.stack(schedule.alpha_sigma(schedule.time(log_snr)), 1)
    assert relative(found, own) < 1e-12
    assert [
        float(schedule.log_snr(torch.tensor(t, dtype=torch.float64))) for t in schedule.time_range
    ] == pytest.approx([float(log_snr[0]), float(log_snr[-1])], rel=1e-9)
    std = NOISES[name].get("schedule_kwargs", {}).get("sigma_data", 1.0)
    shift = 2 * np.log(std)
    ends = [max(float(log_snr[-1]), -14.0 - shift), min(float(log_snr[0]), 16.0 - shift)]
    assert schedule.log_snr_range == pytest.approx(ends, rel=1e-6)


class Recorder(keras.Layer):
    """Keep what a network is called with, and return nothing but zeros."""

    def call(self, inputs, training=False):
        self.seen = inputs[:2]
        return torch.zeros_like(inputs[0])


@pytest.mark.parametrize(("kind", "options"), all_kinds())
def test_the_library_trains_on_the_path_of_the_schedule(kind, options):
    """Of data that are all 1000 the library's own training makes x_t = 1000 alpha, to 4.5 sigma of the noise."""
    made = with_subnet(network(kind, condition=False, **options), Recorder())
    made.compute_metrics(torch.full((256, D), 1000.0), stage="training")
    x_t, time = made.subnet.seen
    schedule = from_bayesflow(made).schedule
    if kind != "flow":
        noise = made.noise_schedule
        time = schedule.time((time + 1) / 2 * (noise.log_snr_max - noise.log_snr_min) + noise.log_snr_min)
    alpha, sigma = schedule.alpha_sigma(time.reshape(len(x_t), -1)[:, :1].double())
    error = (x_t - 1000 * alpha).abs() / (sigma + 1e-3)  # of float32's rounding of 1000
    assert float(error.max()) < 5
    assert float(alpha.std()) > 0.05 or "exploding" in str(options)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", NOISES)
def test_log_prob_of_an_exact_network(name, prediction):
    made = made_exact(network(**NOISES[name], prediction_type=prediction))
    condition = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
    # log_snr_min and log_snr_max are float32 numbers, by which the network's time is off.
    assert_exact(from_bayesflow(made, condition, program=False), shape=(D,), to_user=lambda z: z + shifted(condition),
                 shift=shifted(condition)[0], count=32, rounding=2e-4)  # fmt: skip


def test_log_prob_of_an_exact_flow():
    made = made_exact(network("flow"))
    condition = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
    assert_exact(from_bayesflow(made, condition, program=False), shape=(D,), to_user=lambda z: z + shifted(condition),
                 shift=shifted(condition)[0], count=32, rounding=1e-5)  # fmt: skip


def approximator(made, standardize="inference_variables", adapter=None):
    """An approximator whose standardization has seen data, and parameters a, 3, and b, 1, of which b is positive."""
    if adapter is None:
        adapter = bf.Adapter().log("b").concatenate(["a", "b"], into="inference_variables")
        adapter = adapter.rename("x", "inference_conditions")
    whole = Approximator(inference_network=made, adapter=adapter, standardize=standardize)
    whole.build({"inference_variables": (None, D), "inference_conditions": (None, CONDITION)})
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(1000, D, generator=generator) * torch.tensor([0.1, 2.0, 1.0, 0.3]) + torch.tensor([5.0, -3, 0, 1])
    whole.adapter(named(from_log(u)) | {"x": np.zeros((1000, CONDITION))}, strict=True)
    whole.standardizer.maybe_standardize(u, key="inference_variables", stage="training")
    return whole


def plain():
    """An approximator that leaves parameters as they are, for an observation of two numbers x."""
    adapter = bf.Adapter().rename("theta", "inference_variables").rename("x", "inference_conditions")
    whole = Approximator(inference_network=made_exact(network()), adapter=adapter, standardize=None)
    whole.build({"inference_variables": (None, D), "inference_conditions": (None, CONDITION)})
    return whole


def from_log(u):
    return torch.cat([u[:, :3], u[:, 3:].exp()], 1)


def named(theta):
    return {"a": theta[:, :3].numpy(), "b": theta[:, 3:].numpy()}


def moments(whole):
    layer = whole.standardizer.standardize_layers["inference_variables"]
    return layer.moving_mean[0].value.detach().double(), layer.moving_std(0).detach().double()


@pytest.mark.parametrize("kind", ["flow", "diffusion"])
def test_log_prob_of_parameters_in_their_own_units(kind):
    whole = approximator(made_exact(network(kind)))
    mean, std = moments(whole)
    x = torch.tensor([[0.5, -0.25]])
    density = from_bayesflow(whole, {"x": x.numpy()}, program=False)
    assert density.model.names == ["a", "a", "a", "b"]
    z = TARGET.sample(32, seed=2)
    u = mean + std * (z + shifted(x.double()))
    theta, truth = from_log(u), TARGET.log_prob(z) - std.log().sum() - u[:, 3]
    found = density.estimate(theta, nfe=1024)
    error = (found.log_prob - truth).abs()
    print(
        f"{kind}: worst {float((error / found.stderr).max()):.2f} standard errors of {float(found.stderr.mean()):.3f}"
    )
    assert bool((error < 4 * found.stderr + found.truncation).all())
    # A reference that is exact leaves rounding alone: of the adapter to float32.
    density.density.reference = exact_reference(shifted(x.double())[0])
    assert float((density.estimate(theta, nfe=32).log_prob - truth).abs().max()) < 1e-3
    own = from_bayesflow(whole, program=False)
    many = own.estimate(theta, nfe=32, condition=own.model.resolve({"x": np.repeat(x.numpy(), 32, 0)}))
    own.density.reference = density.density.reference
    many = own.estimate(theta, nfe=32, condition=own.model.resolve({"x": np.repeat(x.numpy(), 32, 0)}))
    assert float((many.log_prob - truth).abs().max()) < 1e-3


def exact_reference(shift):
    return moved(Reference(TARGET.weight, TARGET.mean, TARGET.eigenvalue), shift)


@pytest.mark.parametrize("kind", ["flow", "edm", "cosine"])
def test_likelihood_of_the_librarys_own_ode(kind):
    options = {} if kind == "flow" else NOISES[kind]
    whole = approximator(made_exact(network("flow" if kind == "flow" else "diffusion", **options), CORRELATED))
    mean, std = moments(whole)
    theta = from_log(mean + std * CORRELATED.sample(6, seed=2).double())
    zero = np.zeros((6, CONDITION))
    with torch.enable_grad():
        own = torch.as_tensor(whole.log_prob(named(theta) | {"x": zero}, method="rk45", steps=60))
    density = from_bayesflow(whole, {"x": zero[:1]}, program=False)
    density.density.reference = fit_mixture(CORRELATED.sample(1000, seed=1), full=True)
    found = density.estimate(theta, nfe=1024)
    difference = (found.log_prob - own).abs()
    print(f"{kind}: {float(difference.max()):.4f} at a stderr of {float(found.stderr.mean()):.4f}")
    # 60 steps of fourth order, and the correlation that is left at the library's noisiest time.
    assert bool((difference < 4 * found.stderr + found.truncation + 0.03).all())


@pytest.mark.parametrize("kind", ["flow", "edm, wide", "cosine"])
def test_the_ode_of_a_network_that_is_no_score_is_the_librarys(kind):
    if kind == "cosine" and hasattr(bf, "ContinuousApproximator") and not hasattr(bf, "BasicEstimator"):
        pytest.skip("bayesflow before 2.1 halves the cosine's drift at its clean end")
    made = network("flow") if kind == "flow" else network(**NOISES[kind])
    whole = approximator(made)
    mean, std = moments(whole)
    theta, x = from_log(mean + std * TARGET.sample(6, seed=2)), np.full((6, CONDITION), 0.5)
    with torch.enable_grad():
        own = torch.as_tensor(whole.log_prob(named(theta) | {"x": x}, method="rk45", steps=60))
    density = from_bayesflow(whole, {"x": x[:1]}, program=False)
    found = probability_flow_log_prob(density, theta.float(), method="midpoint", steps=256)
    difference = float((found.log_prob - own).abs().max())
    print(f"{kind}: {difference:.5f} nats")
    assert difference < 0.05  # the steps: four times as many leave a quarter


def test_a_summary_network_is_asked_once():
    made = network("flow", build=False)
    summary = bf.networks.DeepSet(
        summary_dim=3, **{f"mlp_widths_{n}": (8,) for n in ("equivariant", "invariant_inner", "invariant_outer")},
        mlp_widths_invariant_last=(8,),
    )  # fmt: skip
    adapter = bf.Adapter().as_set("x").rename("theta", "inference_variables").rename("x", "summary_variables")
    whole = Approximator(inference_network=made, summary_network=summary, adapter=adapter, standardize=None)
    whole.build({"inference_variables": (None, 2), "summary_variables": (None, 5, 1)})
    data = {"x": np.random.default_rng(0).normal(size=(3, 5, 1)).astype("float32")}
    density = from_bayesflow(whole)
    resolved = density.model.resolve(data)
    own = whole.summarize(data)
    own = own if isinstance(own, torch.Tensor) else torch.as_tensor(own)
    assert torch.equal(resolved, own.detach())
    theta = torch.randn(3, 2)
    each = density.estimate(theta, nfe=16, condition=resolved)
    one = from_bayesflow(whole, {"x": data["x"][:1]}).estimate(theta, nfe=16)
    assert float(each.log_prob[0]) == pytest.approx(float(one.log_prob[0]), rel=1e-4)
    assert float((each.log_prob - one.log_prob)[1:].abs().min()) > 1e-4


def test_gradients_where_the_adapter_has_them():
    plain = bf.Adapter().concatenate(["a", "b"], into="inference_variables").rename("x", "inference_conditions")
    whole = approximator(made_exact(network("flow")), adapter=plain)
    z = TARGET.sample(4, seed=2)
    mean, std = moments(whole)
    theta, shift = (mean + std * z).requires_grad_(), torch.zeros(1, CONDITION)
    density = from_bayesflow(whole, {"x": shift.numpy()}, program=False)
    density.density.reference = exact_reference(torch.zeros(D))
    found = torch.autograd.grad(density.log_prob(theta, nfe=64).sum(), theta)[0]
    z = z.requires_grad_()
    truth = torch.autograd.grad(TARGET.log_prob(z).sum(), z)[0] / std
    assert relative(found, truth) < 1e-3
    logged = from_bayesflow(approximator(made_exact(network("flow"))), {"x": shift.numpy()})
    with pytest.raises(
        ValueError, match="the adapter's transforms have no gradient, and x asks for one; differentiate"
    ):
        logged.log_prob(from_log(theta.detach()).requires_grad_())


def test_an_approximator_that_changes_nothing():
    density = from_bayesflow(plain(), {"x": np.zeros((1, CONDITION))}, program=False)
    assert density.model.names == ["theta"] * D
    assert_exact(density, shape=(D,), count=32, rounding=2e-4)


def test_a_workflow_is_read_as_what_it_holds():
    whole = approximator(network("flow"))
    holder = SimpleNamespace(approximator=whole)
    assert from_bayesflow(holder).model.network is whole.inference_network
